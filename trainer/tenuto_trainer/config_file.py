"""A run's settings as a TOML file, one key per field of TrainConfig: ``--config`` reads one, every run leaves one."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from tenuto_trainer.config import TrainConfig
from tenuto_trainer.errors import TrainConfigError
from tenuto_trainer.settings import settings

FILE = "config.toml"
"""Name of the file in a run's log folder."""


def read(path: Path) -> dict[str, Any]:
    """Return the settings that a file makes. Raises TrainConfigError for what is no setting or of a wrong type.

    Paths in it are relative to the working directory, as those on the command line are.
    """
    try:
        found = tomlkit.parse(path.read_text(encoding="utf-8")).unwrap()
    except OSError as error:
        raise TrainConfigError(f"config: got {str(path)!r}, expected a file to read ({error.strerror})") from error
    except (TOMLKitError, UnicodeDecodeError) as error:
        raise TrainConfigError(f"{path}: not a TOML file ({error})") from error
    known = {setting.name: setting for setting in settings()}
    for name in found:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            if isinstance(found[name], dict):
                raise TrainConfigError(f"{path}: [{name}] is a table, but the file is flat: one key for each setting")
            meant = f"did you mean {' or '.join(map(repr, close))}?" if close else "see tenuto-train --help"
            raise TrainConfigError(f"{path}: {name!r} is not a setting; {meant}")
    try:
        return {name: known[name].from_toml(value) for name, value in found.items()}
    except TrainConfigError as error:
        raise TrainConfigError(f"{path}: {error}") from error


def write(path: Path, config: TrainConfig) -> None:
    """Write all settings of a run, so that ``--config`` repeats it; replaces the file whole. Makes its folder."""
    document = tomlkit.document()
    document.add(
        tomlkit.comment("The settings of the last run with these logs, as `tenuto-train --config` takes them.")
    )
    for setting in settings():
        value = getattr(config, setting.name)
        document.add(tomlkit.nl())
        document.add(tomlkit.comment(setting.help))
        if value is None:
            document.add(tomlkit.comment(f"{setting.name} is not set"))
        else:
            document.add(setting.name, str(value) if isinstance(value, Path) else value)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(tomlkit.dumps(document), encoding="utf-8")
    temporary.replace(path)
