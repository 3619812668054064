"""``tenuto-play``: runs gymnasium environments against a server and says how well its policy does."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from tenuto_client.address import check_address
from tenuto_client.errors import GYM_ADVICE, TenutoError
from tenuto_client.options import PolicyOptions
from tenuto_client.player import Player
from tenuto_client.statistics import PlayStatistics
from tenuto_client.vector_policy import RemoteVectorPolicy, VectorTransport
from tenuto_client.view import open_view


@dataclass(frozen=True)
class PlayOptions:
    """The command line, checked. Raises ValueError."""

    env: str
    """Environment id: popgym-…-v0, a gymnasium id, or module:callable."""
    server: str = "localhost:50051"
    """host:port."""
    policy: str = ""
    """Name; empty: the only one that is served."""
    version: int = 0
    """0: each episode begins with the newest."""
    episodes: int = 10
    """In all environments together; 0: until stopped."""
    num_envs: int = 1
    """Environments that play at once, in one process."""
    transport: VectorTransport = "batch"
    """See RemoteVectorPolicy."""
    deterministic: bool = False
    """The most probable actions instead of samples."""
    seed: int | None = None
    """Of the environments and of the actions; environment i has seed + i."""
    timeout_s: float = 5.0
    """Seconds for one step with all its retries."""
    wait_s: float = 30.0
    """Seconds to wait for the server and the policy, at first and whenever they are away."""

    def __post_init__(self) -> None:
        if self.num_envs < 1:
            raise ValueError(f"--num-envs: got {self.num_envs}, expected at least 1")
        if self.episodes < 0:
            raise ValueError(f"--episodes: got {self.episodes}, expected 0 (until stopped) or more")
        check_address(self.server, "--server")
        # Checks the rest.
        PolicyOptions(
            self.policy,
            self.version,
            self.seed,
            self.deterministic,
            timeout_s=self.timeout_s,
            wait_for_policy_s=self.wait_s,
        )


def parse_args(argv: Sequence[str] | None = None) -> PlayOptions:
    """Read argv. Exits with a message for what argparse refuses; raises ValueError for the rest."""
    parser = argparse.ArgumentParser(prog="tenuto-play", description=__doc__)
    parser.add_argument("--env", required=True, metavar="ID", help="popgym-…-v0, a gymnasium id, or module:callable")
    parser.add_argument("--server", default=PlayOptions.server, metavar="HOST:PORT")
    parser.add_argument("--policy", default="", metavar="NAME", help="default: the only one that is served")
    parser.add_argument("--version", type=int, default=0, help="default: each episode begins with the newest")
    parser.add_argument("--episodes", type=int, default=PlayOptions.episodes, metavar="N", help="0: until stopped")
    parser.add_argument("--num-envs", type=int, default=PlayOptions.num_envs, metavar="K", help="played at once")
    parser.add_argument("--transport", choices=("batch", "stream"), default=PlayOptions.transport)
    parser.add_argument("--deterministic", action="store_true", help="most probable actions instead of samples")
    parser.add_argument("--seed", type=int, help="of environments and actions")
    parser.add_argument("--timeout-s", type=float, default=PlayOptions.timeout_s, help="of one step with its retries")
    parser.add_argument("--wait-s", type=float, default=PlayOptions.wait_s, help="for a server that is away")
    return PlayOptions(**vars(parser.parse_args(argv)))


def play(options: PlayOptions) -> PlayStatistics:
    """Play until enough episodes are finished, or SIGINT or SIGTERM comes; sessions are closed either way.

    Raises TenutoError or tenuto_envs.EnvError.
    """
    import tenuto_envs

    stop = StopSignal()
    envs = [tenuto_envs.make(options.env)]
    try:
        with (
            RemoteVectorPolicy(
                options.server,
                options.num_envs,
                options.policy,
                transport=options.transport,
                version=options.version,
                seed=options.seed,
                deterministic=options.deterministic,
                outputs=(),
                timeout_s=options.timeout_s,
                wait_for_policy_s=options.wait_s,
            ) as policy,
            open_view() as view,
        ):
            envs += [tenuto_envs.make(options.env) for _ in range(options.num_envs - 1)]
            player = Player(envs, policy, num_episodes=options.episodes, seed=options.seed, patience_s=options.wait_s)
            statistics = player.play(view, stop)
            policy.close(player.last_rewards)
            return statistics
    finally:
        for env in envs:
            env.close()
        stop.restore()


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a question that is answered between two steps; a second one kills."""

    def __init__(self) -> None:
        self._came = False
        self._before: dict[int, Any] = {
            number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)
        }

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._came = True
        self.restore()

    def __call__(self) -> bool:
        """Whether one came."""
        return self._came

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def refuse(error: Exception) -> NoReturn:
    """Exit as argparse does, in one line."""
    print(f"tenuto-play: {error}", file=sys.stderr)
    sys.exit(2)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``tenuto-play``. Exits with one line for everything that can be said in one: with 2 where the
    command line is wrong, with 1 where playing failed.
    """
    try:
        options = parse_args(argv)
    except ValueError as error:
        refuse(error)
    try:
        from tenuto_envs import EnvError, UnknownEnvError
    except ImportError as error:
        sys.exit(f"tenuto-play: environments need a missing package ({error}): {GYM_ADVICE}")
    # The player says itself what happens to its sessions.
    logging.getLogger("tenuto_client").addHandler(logging.NullHandler())
    try:
        statistics = play(options)
    except UnknownEnvError as error:
        refuse(error)
    except EnvError as error:
        sys.exit(f"tenuto-play: {error}")
    except TenutoError as error:
        sys.exit(f"tenuto-play: server {options.server}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    print("\n".join(statistics.summary()))


if __name__ == "__main__":
    main()
