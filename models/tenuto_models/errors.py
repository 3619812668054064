"""Errors of the models package.

ModelError
├── InputError       a tensor of another shape or dtype than the model takes
├── TornError        a step that failed after it may have changed the state that it was given
├── ConfigError      a configuration value or space that no policy can be built from
└── CheckpointError  a checkpoint that must not be used: broken, truncated, tampered with or mismatched
"""

from __future__ import annotations


class ModelError(Exception):
    """Base of every error that this package raises on purpose. The text says what, got, expected."""


class InputError(ModelError, ValueError):
    """A tensor of another shape or dtype than the model takes; nothing was computed."""


class TornError(ModelError):
    """A step failed after it may have changed the state in place: nobody knows what that is worth."""


class ConfigError(ModelError, ValueError):
    """A configuration value, an unknown key or a space that no policy can be built from."""


class CheckpointError(ModelError):
    """A checkpoint that must not be used; nothing of it was loaded."""
