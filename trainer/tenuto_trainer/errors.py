"""Errors of the trainer package.

TrainerError
├── TrainConfigError  a setting, environment or space that no training can start from
├── StateError        a training state that no run may go on from; a run that finds one says so and starts without it
├── DivergedError     training produced a loss or weights that are not finite
├── RefusedError      the newest version was published, but the server will not serve it
└── ImportedError     a checkpoint of RLlib's old API stack that no version can be made of
"""

from __future__ import annotations


class TrainerError(Exception):
    """Base of every error that this package raises on purpose. The text says what, got, expected."""

    exit_code = 1
    """What the process exits with when the error ends it."""


class TrainConfigError(TrainerError, ValueError):
    """A setting, an environment or a space that no training can start from."""

    exit_code = 2


class StateError(TrainerError):
    """A training state that is damaged or belongs to something else; nothing of it was used."""


class DivergedError(TrainerError):
    """Training produced a loss or weights that are not finite; what was published before stays good."""


class RefusedError(TrainerError):
    """The server that the run was told of refuses the newest version; it goes on with an older one, if it has one."""


class ImportedError(TrainerError):
    """A checkpoint of RLlib's old API stack that no version can be made of; nothing was published."""
