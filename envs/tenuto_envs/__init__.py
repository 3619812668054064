"""Environments by id, the same for training and for serving. Imports nothing else of tenuto."""

from tenuto_envs.conform import ConformObservation
from tenuto_envs.errors import EnvError, MissingPackageError, ObservationError, UnknownEnvError
from tenuto_envs.make import make

__all__ = [
    "ConformObservation",
    "EnvError",
    "MissingPackageError",
    "ObservationError",
    "UnknownEnvError",
    "make",
]
