"""The fixtures of the tests that talk to a real server over a socket."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from serving import ServerProcess, publish, small_policy


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for all tests that neither stop it nor publish to it: policies "dnc" and "frameconv", version 1."""
    repository: Path = tmp_path_factory.mktemp("repository")
    for name in ("dnc", "frameconv"):
        publish(repository, small_policy(name), name)
    with ServerProcess(repository) as running:
        yield running
