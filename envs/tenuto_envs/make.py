"""Environments by id, the same for training and for serving: POPGym's, gymnasium's, or a user's own."""

from __future__ import annotations

import difflib
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import gymnasium

from tenuto_envs.conform import ConformObservation, Env
from tenuto_envs.errors import MissingPackageError, UnknownEnvError

_POPGYM = "popgym-"
_INSTALL = "install it with: pip install 'tenuto[gym]', or pip install '.[gym]' in a clone"


def make(env_id: str) -> Env:
    """Build an environment whose observations always lie in its observation space.

    ``popgym-…-v0``    POPGym's, wrapped as its baselines are: ``Antialias(PreviousAction(env))``
    ``module:callable``  a user's own; the callable takes no arguments and returns a gymnasium.Env. The module is
                         looked for in the working directory, too, which goes to the front of ``sys.path``
    anything else      an id in gymnasium's registry

    Raises UnknownEnvError or MissingPackageError; what a user's own callable raises passes through.
    """
    if env_id.startswith(_POPGYM):
        return ConformObservation(_make_popgym(env_id))
    if ":" in env_id:
        return ConformObservation(_make_own(env_id))
    return ConformObservation(_make_registered(env_id))


def _make_popgym(env_id: str) -> Env:
    try:
        from popgym.wrappers import Antialias, PreviousAction
    except ImportError as error:
        raise MissingPackageError(
            f"environment {env_id!r} needs popgym, which cannot be imported ({error}); {_INSTALL}"
        ) from error
    if env_id.startswith("popgym-Labyrinth") and find_spec("mazelib") is None:
        raise MissingPackageError(f"environment {env_id!r} needs mazelib, which is not installed; {_INSTALL}")
    # POPGym's wrappers take any gymnasium.Env, their annotation asks for its own class.
    return cast(Env, Antialias(PreviousAction(cast(Any, _make_registered(env_id)))))


def _make_registered(env_id: str) -> Env:
    # Without a version gymnasium would take the newest, and another one tomorrow.
    if env_id not in gymnasium.registry:
        close = difflib.get_close_matches(env_id, list(gymnasium.registry), n=3, cutoff=0.6)
        raise UnknownEnvError(
            f"environment: got {env_id!r}, which is not registered, expected a popgym-…-v0 id, a gymnasium id or "
            f"module:callable{'; did you mean ' + ' or '.join(map(repr, close)) + '?' if close else ''}"
        )
    try:
        # ConformObservation looks at every observation; gymnasium's checker looks at the first only.
        return gymnasium.make(env_id, disable_env_checker=True)
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        raise MissingPackageError(f"environment {env_id!r} needs a missing package: {error}") from error
    except gymnasium.error.Error as error:
        raise UnknownEnvError(f"environment: got {env_id!r}, which gymnasium refuses ({error})") from error


def _make_own(env_id: str) -> Env:
    module_name, _, attribute = env_id.partition(":")
    # A console script, unlike `python -m`, does not look there.
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = import_module(module_name)
    except (ImportError, ValueError) as error:
        raise UnknownEnvError(
            f"environment: got {env_id!r}, expected module:callable with a module in the working directory or on "
            f"the Python path ({error})"
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        close = difflib.get_close_matches(attribute, known, n=3, cutoff=0.6)
        raise UnknownEnvError(
            f"environment: got {env_id!r}, but {module_name!r} has no callable {attribute!r}"
            f"{'; did you mean ' + ' or '.join(map(repr, close)) + '?' if close else ''}"
        )
    env = factory()
    if not isinstance(env, gymnasium.Env):
        raise UnknownEnvError(f"environment: {env_id!r} returned {type(env).__name__}, expected a gymnasium.Env")
    return cast(Env, env)
