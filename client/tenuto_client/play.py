"""``tenuto-play``: runs gymnasium environments against a server and says how well its policy does."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from types import FrameType
from typing import Any, NoReturn

from tenuto_client.access_files import AccessFiles, add_access_flags
from tenuto_client.address import check_address
from tenuto_client.errors import (
    GYM_ADVICE,
    DrainingError,
    PolicyUnknownError,
    ServerUnavailableError,
    TenutoError,
)
from tenuto_client.options import PolicyOptions
from tenuto_client.player import Player
from tenuto_client.statistics import PlayStatistics
from tenuto_client.vector_policy import RemoteVectorPolicy, VectorTransport
from tenuto_client.view import View, open_view

STOP_GRACE_S = 0.3
"""How long a step may go on after a signal."""


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
    """Seconds to wait for the server and the policy, at first and since the server was last seen."""
    access: AccessFiles = field(default_factory=AccessFiles)
    """Who calls, and whom to trust to be the server."""

    def __post_init__(self) -> None:
        self.access.token()
        self.access.credentials()
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
    parser = argparse.ArgumentParser(prog="tenuto-play", allow_abbrev=False, description=__doc__)
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
    add_access_flags(parser)
    flags = vars(parser.parse_args(argv))
    access = AccessFiles(**{of_access.name: flags.pop(of_access.name) for of_access in fields(AccessFiles)})
    return PlayOptions(**flags, access=access)


def play(options: PlayOptions, statistics: PlayStatistics) -> None:
    """Play until enough episodes are finished, or SIGINT or SIGTERM comes; sessions are closed either way.

    Fills ``statistics``, also where it raises TenutoError or tenuto_envs.EnvError.
    """
    import tenuto_envs

    stop = StopSignal()
    envs: list[Any] = []
    policy = RemoteVectorPolicy(
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
        credentials=options.access.credentials(),
        token=options.access.token(),
    )
    final_rewards: Any = None
    try:
        with open_view() as view, stop.interrupts():
            # An environment that cannot be made is said before anybody waits for a server.
            envs.append(tenuto_envs.make(options.env))
            policy.connect(waiting_notes(options, view))
            envs += [tenuto_envs.make(options.env) for _ in range(options.num_envs - 1)]
            player = Player(
                envs,
                policy,
                num_episodes=options.episodes,
                seed=options.seed,
                patience_s=options.wait_s,
                statistics=statistics,
            )
            player.play(view, stop)
            # Not after an interrupted step, which has perhaps carried them already.
            final_rewards = player.final_rewards()
    finally:
        policy.close(final_rewards)
        for env in envs:
            env.close()
        stop.restore()


def waiting_notes(options: PlayOptions, view: View) -> Callable[[TenutoError], None]:
    """Return what notes why the first connection waits, once for each reason."""
    noted = ""

    def note(error: TenutoError) -> None:
        nonlocal noted
        if isinstance(error, DrainingError):
            text = f"waiting for the successor of the server at {options.server}, which shuts down"
        elif isinstance(error, ServerUnavailableError):
            text = f"waiting for a server at {options.server}"
        elif isinstance(error, PolicyUnknownError):
            version = f" version {options.version}" if options.version else ""
            text = f"waiting for policy {options.policy!r}{version}; {error}" if options.policy else f"waiting; {error}"
        else:
            text = f"waiting for the server at {options.server}; {error}"
        if text != noted:
            view.note(f"{text} (at most {options.wait_s or options.timeout_s:g} s)")
        noted = text

    return note


class Stopped(BaseException):
    """Ends what the player waits for. No Exception, so that nobody takes it for a failure."""


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a question that is answered between two steps, and into Stopped where no
    answer comes soon; a second one kills.
    """

    def __init__(self) -> None:
        self._came = self._interrupts = False
        self._before: dict[int, Any] = {
            number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)
        }
        self._alarm_before = signal.signal(signal.SIGALRM, self._interrupt)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._came = True
        self._give_back()
        # Repeated, because an exception may be lost where it cannot be raised, as in a destructor.
        signal.setitimer(signal.ITIMER_REAL, STOP_GRACE_S, STOP_GRACE_S)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._interrupts:
            raise Stopped

    def __call__(self) -> bool:
        """Whether one came."""
        return self._came

    @contextmanager
    def interrupts(self) -> Generator[None]:
        """Let a signal end the block, in STOP_GRACE_S where it does not end by itself; swallow Stopped."""
        try:
            self._interrupts = True
            yield
        except Stopped:
            pass
        finally:
            self._interrupts = False

    def restore(self) -> None:
        """Give the signals back."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._give_back()
        signal.signal(signal.SIGALRM, self._alarm_before)

    def _give_back(self) -> None:
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
    statistics = PlayStatistics()
    try:
        play(options, statistics)
    except UnknownEnvError as error:
        refuse(error)
    except EnvError as error:
        sys.exit(f"tenuto-play: {error}")
    except TenutoError as error:
        sys.exit(f"tenuto-play: server {options.server}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        # Also what was played until something went wrong.
        if statistics.num_steps:
            print("\n".join(statistics.summary()), flush=True)
    if not statistics.num_steps:
        print("stopped before the first step")


if __name__ == "__main__":
    main()
