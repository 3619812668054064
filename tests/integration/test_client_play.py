"""tenuto-play as a command: it plays, sums up, gives its sessions back, and says in one line what is wrong."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import tenuto_envs
from serving import ServerProcess, publish, small_policy, wait_until
from tenuto_proto.v1 import policy_pb2 as pb

ENV = "popgym-RepeatPreviousEasy-v0"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tenuto_client.play", *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    repository: Path = tmp_path_factory.mktemp("repository")
    env = tenuto_envs.make(ENV)
    publish(repository, small_policy("dnc", env.observation_space, env.action_space), "memory")
    with ServerProcess(repository) as running:
        yield running


def sessions(server: ServerProcess) -> list[pb.Session]:
    return list(server.stub.ListSessions(pb.ListSessionsRequest()).sessions)


@pytest.mark.parametrize("transport", ["batch", "stream"])
def test_plays_as_many_episodes_as_asked_and_closes_its_sessions(server: ServerProcess, transport: str) -> None:
    labels = '{policy="memory",version="1"}'
    before = [server.metric(f"tenuto_episode_return_{what}{labels}") for what in ("count", "sum")]
    played = run("--env", ENV, "--server", server.address, "--episodes", "7", "--num-envs", "3", "--seed", "1",
                 "--transport", transport)  # fmt: skip
    assert played.returncode == 0, played.stderr
    header, row, total = played.stdout.splitlines()[-3:]
    assert header.split() == ["version", "episodes", "mean", "return", "spread"]
    assert row.split()[:2] == ["1", "7"] and -1 <= float(row.split()[2]) <= 1
    assert total.startswith("7 episodes, ")
    assert not sessions(server) and not played.stderr
    # The server has heard every reward, also those of last actions, and credits them to the same episodes.
    after = [server.metric(f"tenuto_episode_return_{what}{labels}") for what in ("count", "sum")]
    assert after[0] - before[0] == 7
    assert after[1] - before[1] == pytest.approx(7 * float(row.split()[2]), abs=7 * 0.0006)


def test_the_same_seed_plays_the_same_game(server: ServerProcess) -> None:
    arguments = ("--env", ENV, "--server", server.address, "--episodes", "4", "--num-envs", "2", "--seed", "3")
    first, second = run(*arguments), run(*arguments, "--transport", "stream")
    assert first.returncode == second.returncode == 0
    assert first.stdout.splitlines()[-2] == second.stdout.splitlines()[-2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_game_cleanly(server: ServerProcess, number: signal.Signals) -> None:
    arguments = command("--env", ENV, "--server", server.address, "--episodes", "0", "--num-envs", "2")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as playing:
        wait_until(lambda: any(s.next_step_index > 5 for s in sessions(server)), "the game to begin")
        playing.send_signal(number)
        out, err = playing.communicate(timeout=60)
    assert (playing.returncode, err) == (0, "")
    assert " steps; step p50 " in out
    assert not sessions(server)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("awaited", ["server", "policy"])
def test_a_signal_ends_waiting_at_once(server: ServerProcess, number: signal.Signals, awaited: str) -> None:
    address = "127.0.0.1:1" if awaited == "server" else server.address
    arguments = command("--env", ENV, "--server", address, "--policy", "nope")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as playing:
        assert playing.stdout is not None
        note = playing.stdout.readline()
        expected = "waiting for a server at 127.0.0.1:1 (" if awaited == "server" else "waiting for policy 'nope'; "
        assert note.startswith(expected) and "at most 30 s" in note
        playing.send_signal(number)
        began_s = time.monotonic()
        out, err = playing.communicate(timeout=60)
    assert (playing.returncode, out, err) == (0, "stopped before the first step\n", "")
    assert time.monotonic() - began_s < 3.0


def test_a_signal_ends_a_step_that_gets_no_answer(tmp_path: Path) -> None:
    env = tenuto_envs.make(ENV)
    publish(tmp_path, small_policy("dnc", env.observation_space, env.action_space), "memory")
    with ServerProcess(tmp_path) as server:
        arguments = command("--env", ENV, "--server", server.address, "--episodes", "0", "--timeout-s", "60")
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as playing:
            wait_until(lambda: any(s.next_step_index > 5 for s in sessions(server)), "the game to begin")
            server.process.send_signal(signal.SIGSTOP)
            try:
                playing.send_signal(signal.SIGINT)
                began_s = time.monotonic()
                out, err = playing.communicate(timeout=60)
                waited_s = time.monotonic() - began_s
            finally:
                server.process.send_signal(signal.SIGCONT)
        assert (playing.returncode, err) == (0, "")
        assert " steps; step p50 " in out
        assert waited_s < 5.0


def test_what_was_played_is_summed_up_also_where_the_server_goes_away(tmp_path: Path) -> None:
    env = tenuto_envs.make(ENV)
    publish(tmp_path, small_policy("dnc", env.observation_space, env.action_space), "memory")
    with ServerProcess(tmp_path) as server:
        arguments = command("--env", ENV, "--server", server.address, "--episodes", "0", "--wait-s", "0.5",
                            "--timeout-s", "1")  # fmt: skip
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as playing:
            wait_until(lambda: any(s.next_step_index > 200 for s in sessions(server)), "episodes to end")
            server.process.kill()
            out, err = playing.communicate(timeout=60)
    assert playing.returncode == 1
    header, row, total = out.splitlines()[-3:]
    assert header.split() == ["version", "episodes", "mean", "return", "spread"]
    assert row.split()[0] == "1" and int(row.split()[1]) > 0 and " steps; step p50 " in total
    assert err.startswith("tenuto-play: server 127.0.0.1:") and "did not come back within 0.5 s" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--env", "CartPol-v1"), 2, "did you mean 'CartPole-v1'"),
        (("--env", "CartPole-v1"), 1, "observation space: got Box"),
        (("--env", ENV, "--policy", "nobody", "--wait-s", "0"), 1, "nobody"),
        (("--env", ENV, "--num-envs", "0"), 2, "--num-envs: got 0"),
        (("--env", ENV, "--server", "foo"), 2, "--server: got 'foo', expected host:port"),
        (("--env", ENV, "--server", "127.0.0.1:1", "--wait-s", "0", "--timeout-s", "0.5"), 1, "server 127.0.0.1:1: "),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    server: ServerProcess, arguments: tuple[str, ...], code: int, message: str
) -> None:
    played = run("--server", server.address, *arguments)
    assert played.returncode == code
    assert played.stderr.startswith("tenuto-play: ") and played.stderr.count("\n") == 1
    assert message in played.stderr
    assert not sessions(server)


def test_a_game_goes_on_after_a_restart(tmp_path: Path) -> None:
    env = tenuto_envs.make(ENV)
    publish(tmp_path, small_policy("dnc", env.observation_space, env.action_space), "memory")
    first = ServerProcess(tmp_path)
    arguments = command("--env", ENV, "--server", first.address, "--episodes", "0", "--num-envs", "2")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as playing:
        wait_until(lambda: any(s.next_step_index > 5 for s in sessions(first)), "the game to begin")
        first.close()
        with ServerProcess(tmp_path, "--port", str(first.port)) as second:
            wait_until(lambda: any(s.next_step_index > 60 for s in sessions(second)), "the game to go on")
            playing.send_signal(signal.SIGTERM)
            out, err = playing.communicate(timeout=60)
            assert (playing.returncode, err) == (0, "")
            assert "2 episodes lost, they begin anew: the server restarted" in out
            assert not sessions(second)
