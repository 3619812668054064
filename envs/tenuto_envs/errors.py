"""Errors of the environments package.

EnvError
├── UnknownEnvError      an id that names no environment
├── MissingPackageError  the environment exists, but a package that it needs is not installed
└── ObservationError     an environment emitted something that its observation space cannot hold
"""

from __future__ import annotations


class EnvError(Exception):
    """Base of every error that this package raises on purpose. The text says what, got, expected."""


class UnknownEnvError(EnvError, ValueError):
    """An id that names no environment; the text lists close matches."""


class MissingPackageError(EnvError, ImportError):
    """A package that the environment needs is not installed; the text says how to install it."""


class ObservationError(EnvError):
    """An observation that no cast or clip brings into the environment's own observation space."""
