"""The dashboard and the alerts of deploy/ against a real Prometheus that scrapes a real server.

One server is put through everything that an operator might see: no policy, load, a full queue, slots that run out,
sessions that expire, wrong steps, versions that are broken, do not fit, compute NaN or return less, a device that hangs
and a process that stands still for a moment. A second one, with TLS and tokens, loses its files and then its device's
memory. Meanwhile Prometheus evaluates alerts.yml as it is, except that waiting
times and ranges are seconds instead of minutes. What must hold then:

- every alert has fired, so none can hide a wrong name, label or join behind a result that is empty in health;
- every expression of the dashboard gives a number, and every label that its legend names;
- every selector of both, taken by itself, has found a series, so that ``or`` and ``unless`` hide no typo either.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import numpy as np
import pytest
import yaml

from serving import (
    ServerProcess,
    failing_while_exists,
    hanging_while_exists,
    overflowing_policy,
    publish,
    small_policy,
    wait_until,
)
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_proto.v1 import policy_pb2_grpc
from tenuto_server import tokens
from tenuto_server.principals import Principal
from tenuto_server.snapshots import seal
from tenuto_server.store import SQLiteStore, StoredSession
from wire import CODEC, WireSession, batch, observations, refused

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS, DASHBOARD = DEPLOY / "prometheus", DEPLOY / "grafana" / "tenuto.json"
RULES = [rule for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
# Seconds for what is minutes and hours in operation. The load comes round every two seconds.
RANGE, OFFSET_S = "15s", "5"

pytestmark = [
    pytest.mark.timeout(300),  # Half a minute; more where others use the cores.
    pytest.mark.skipif(
        any(shutil.which(program) is None for program in ("prometheus", "promtool")),
        reason="needs prometheus and promtool, for example from Debian's package prometheus",
    ),
]


def promtool(*arguments: str, text: str | None = None) -> str:
    """Run promtool beside the rules; its output where it is content."""
    done = subprocess.run(
        ["promtool", *arguments], cwd=PROMETHEUS, input=text, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def hastened(expression: str) -> str:
    """The same expression over seconds."""
    expression = expression.replace("6 * 3600", OFFSET_S).replace("unsaved_seconds) > 30", "unsaved_seconds) > 1")
    return re.sub(r"offset \d+[smhd]", f"offset {OFFSET_S}s", re.sub(r"\[\d+[smhd]\]", f"[{RANGE}]", expression))


def dashboard_queries() -> list[tuple[str, str, str]]:
    """Title of the panel, expression with variables substituted, legend."""
    found: list[tuple[str, str, str]] = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"].replace("$__rate_interval", RANGE)
            expression = re.sub(r"\$(instance|policy)\b", ".*", expression)
            found.append((panel["title"], expression, target["legendFormat"]))
    return found


def selectors(expression: str) -> list[str]:
    """The metrics that an expression reads, each with its matchers."""
    name = r"\b(?:policy(?:_version)?:\w+:\w+|tenuto_\w+|process_\w+|up|ALERTS)\b"
    return re.findall(rf"{name}(?:\{{[^}}]*\}})?", expression)


# ---------------------------------------------------------------------------------------------- the scene


class Prometheus:
    """A real Prometheus on a free port of loopback."""

    def __init__(self, folder: Path, targets: list[str]) -> None:
        config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        (scrape,) = config["scrape_configs"]
        scrape["static_configs"] = [{"targets": targets}]
        rules = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())
        for rule in (rule for group in rules["groups"] for rule in group["rules"]):
            rule["expr"] = hastened(rule["expr"])
            rule.pop("for", None)
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        (folder / "alerts.yml").write_text(yaml.safe_dump(rules))
        command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
        self.process = subprocess.Popen(
            [*command, "--web.listen-address=127.0.0.1:0"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        try:
            self.port = int(wait_until(self._listening, "Prometheus to listen")[1])
        except BaseException:
            self.close()
            raise

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.rstrip())

    def _listening(self) -> Any:
        log = "\n".join(self.log)
        assert self.process.poll() is None, log
        return "Server is ready" in log and re.search(r'"Listening on" address=127\.0\.0\.1:(\d+)', log)

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """The result now: labels and value of each series. Fails where Prometheus refuses the expression."""
        url = f"http://127.0.0.1:{self.port}/api/v1/query"
        try:
            body = urllib.parse.urlencode({"query": expression}).encode()
            with urllib.request.urlopen(url, body, timeout=10) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                pytest.fail(f"{expression}\n{error.read().decode()}")
        return [(series["metric"], float(series["value"][1])) for series in answer["data"]["result"]]

    def fired(self) -> dict[str, list[dict[str, str]]]:
        """The alerts that have fired so far, each with the labels it had."""
        found: dict[str, list[dict[str, str]]] = {}
        for labels, _ in self.query('max_over_time(ALERTS{alertstate="firing"}[1h])'):
            found.setdefault(labels["alertname"], []).append(labels)
        return found

    def __enter__(self) -> Prometheus:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


ROWS, CAPACITY = 8, 24
# A request of 8 rows runs at once; one of fewer waits 0.7 s for company: a slow step, and a queue that is nearly full.
FLAGS = ("--capacity", str(CAPACITY), "--max-batch", str(ROWS), "--max-queued", str(ROWS),
         "--max-wait-ms", "700", "--idle-timeout-s", "5", "--queue-timeout-s", "2",
         "--stall-timeout-s", "2")  # fmt: skip


def opened(server: ServerProcess) -> WireSession:
    """A new session, as soon as the load's abandoned ones have left a slot."""

    def attempt() -> WireSession | None:
        try:
            return WireSession(server, "policy")
        except grpc.RpcError:
            return None

    return wait_until(attempt, "a slot")


class Load:
    """Clients of all kinds, good and bad, in a thread of their own; the same round again and again."""

    def __init__(self, server: ServerProcess) -> None:
        self.server, self.reward = server, 1.0
        self._stop, self._thread = threading.Event(), ThreadPoolExecutor(1)
        self._sessions = [WireSession(server, "policy") for _ in range(ROWS)]
        self._observations = observations(ROWS)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._round()

    def _round(self) -> None:
        stub = self.server.stub
        for _ in range(3):
            self._settle(stub.StepBatch(self._request(ROWS)), ROWS)
        (answer,) = stub.StepStream(iter([self._request(ROWS)]))
        self._settle(answer, ROWS)
        self._settle(stub.StepBatch(self._request(ROWS - 1)), ROWS - 1)
        first = self._sessions[0]
        # For which the overflowing policy puts out nothing finite.
        step = first.request((np.zeros(3, np.float32), 0), episode_start=True, reward=self.reward)
        if self._fails(stub.Step, step) is None:
            first.index += 1
        self._fails(stub.Step, first.request(self._observations[0], index=first.index + 7))
        self._fails(stub.Step, pb.StepRequest(session_id=first.id, step_index=first.index))
        self._fails(stub.Step, pb.StepRequest(session_id=1))
        # Sessions that are left to expire, until there is no slot any more.
        opened: pb.OpenSessionResponse | None = None
        for _ in range(CAPACITY + 1):
            try:
                opened = stub.OpenSession(pb.OpenSessionRequest())
            except grpc.RpcError:
                break
        if opened is not None:
            stub.CloseSession(pb.CloseSessionRequest(session_id=opened.session_id))

    def _request(self, rows: int) -> pb.StepBatchRequest:
        """Each step begins an episode, so each reward is a return."""
        return batch(
            self._sessions[:rows], self._observations[:rows], episode_starts=[True] * rows, rewards=[self.reward] * rows
        )

    def _settle(self, response: pb.StepBatchResponse, rows: int) -> None:
        failed = {error.row: error.error.reason for error in response.errors}
        for row in range(rows):
            if row not in failed:
                self._sessions[row].index += 1
            elif failed[row] == pb.SESSION_EXPIRED:  # The machine stood still for long.
                self._sessions[row] = opened(self.server)

    @staticmethod
    def _fails(call: Any, request: Any) -> grpc.StatusCode | None:
        try:
            call(request)
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            return error.code()
        return None

    def __enter__(self) -> Load:
        self._running = self._thread.submit(self._run)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop.set()
        self._thread.shutdown()
        self._running.result()


ANY_PROCESS = (
    "import prometheus_client as p, threading; p.start_http_server({port}, '127.0.0.1'); threading.Event().wait()"
)
"""A target that can be restarted quickly; the alert knows only when it was started."""


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def _store_of_another_state(path: Path) -> Path:
    """A store with a session that no server can go on with."""
    foreign = pb.SessionSnapshot(format_version=1, session_id=5, policy_name="policy", state_fingerprint="another")
    store = SQLiteStore(path)
    store.write([StoredSession(5, 0, seal(foreign).SerializeToString())], [])
    store.close()
    return path


CERTIFICATE = (
    "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 9 -keyout server.key -out server.pem "
    "-subj /CN=localhost -addext subjectAltName=DNS:localhost"
)


class Locked:
    """A server with TLS and tokens, whose files and whose device fail at once."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._repository, self._tokens, self._fault = folder / "repository", folder / "tokens.json", folder / "fault"
        publish(self._repository, small_policy())
        subprocess.run(CERTIFICATE.split(), cwd=folder, check=True, capture_output=True)
        self._caller = _bearing(tokens.add(self._tokens, Principal("caller")))
        self._greedy = _bearing(tokens.add(self._tokens, Principal("greedy", max_sessions=0)))
        flags = ("--tokens", str(self._tokens), "--tls-certificate", str(folder / "server.pem"))
        flags += ("--tls-key", str(folder / "server.key"))
        fault = failing_while_exists(self._fault)
        self.server = stack.enter_context(ServerProcess(self._repository, *flags, fault=fault))
        trusted = grpc.ssl_channel_credentials((folder / "server.pem").read_bytes())
        channel = stack.enter_context(grpc.secure_channel(f"localhost:{self.server.port}", trusted))
        self._stub = policy_pb2_grpc.PolicyServiceStub(channel)

    def fail(self) -> None:
        """Lose the repository, the tokens and the device's memory; a session is refused now and then meanwhile."""
        session_id = self._stub.OpenSession(pb.OpenSessionRequest(), metadata=self._caller).session_id
        observed = CODEC.pack(observations(1)[0])
        self._repository.rename(self._repository.with_name("elsewhere"))
        self._fault.write_text("torch.OutOfMemoryError('no memory')")
        step = pb.StepRequest(session_id=session_id, observation=observed)
        while not self.server.metric('tenuto_state{tenuto_state="failing"}'):
            assert refused(self._stub.Step, step, metadata=self._caller)[1] == "COMPUTE_FAILED"
        self._tokens.write_text("{")
        wait_until(lambda: self.server.metric("tenuto_repository_readable") == 0, "the repository to be missed")

    def ask_for_too_much(self) -> None:
        for _ in range(5):
            assert (
                refused(self._stub.OpenSession, pb.OpenSessionRequest(), metadata=self._greedy)[1] == "QUOTA_EXCEEDED"
            )


def _bearing(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


class Scene:
    """A server that has been through everything and is still under load, and the Prometheus that watched it."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.repository = folder / "repository"
        hang = folder / "hang"
        fault = hanging_while_exists(hang)
        store = ("--durability", f"sqlite:{_store_of_another_state(folder / 'sessions.db')}")
        (folder / "locked").mkdir()
        locked = Locked(folder / "locked", stack)
        self.server = stack.enter_context(ServerProcess(self.repository, *FLAGS, *store, wait=False, fault=fault))
        # A port that is taken and that nobody listens on.
        silent = stack.enter_context(socket.socket())
        silent.bind(("127.0.0.1", 0))
        self.instance = f"127.0.0.1:{self.server.metrics_port}"
        self.silent_instance = f"127.0.0.1:{silent.getsockname()[1]}"
        restarting = _free_port()
        targets = [self.instance, self.silent_instance, f"127.0.0.1:{restarting}"]
        targets.append(f"127.0.0.1:{locked.server.metrics_port}")
        self.prometheus = stack.enter_context(Prometheus(folder, targets))
        # It runs by now, and all its rows have begun at 0.
        self._await_alerts("TenutoNoPolicy", "TenutoServerDown", "TenutoCertificateExpires")
        locked.fail()
        started = f'up{{instance="127.0.0.1:{restarting}"}} == 1'
        for _ in range(3):
            with subprocess.Popen([sys.executable, "-c", ANY_PROCESS.format(port=restarting)]) as process:
                wait_until(lambda: self.prometheus.query(started), "a scrape of the process")
                process.kill()
            wait_until(lambda: not self.prometheus.query(started), "a scrape without it")

        publish(self.repository, small_policy())
        wait_until(lambda: self.server.http("/readyz")[0] == 200, "readiness", 90)
        load = stack.enter_context(Load(self.server))
        self._await_metric('tenuto_episode_return_count{version="1"}', 50)
        load.reward = 0.5
        broken = publish(folder / "elsewhere", small_policy(), version=2)
        (broken / "manifest.json").write_text("{}")
        broken.rename(self.repository / "policy" / "2")
        self._await_metric('tenuto_versions_refused_total{reason="broken"}', 1)
        publish(self.repository, small_policy("frameconv"), version=3)
        self._await_metric('tenuto_versions_refused_total{reason="mismatch"}', 1)
        publish(self.repository, overflowing_policy(), version=4)
        self._await_alerts("TenutoComputeFails", "TenutoInternalErrors")
        publish(self.repository, small_policy(seed=1), version=5)
        self._await_metric('tenuto_episode_return_count{version="5"}', 50)
        for _ in range(3):
            self.server.process.send_signal(signal.SIGSTOP)
            time.sleep(0.5)
            self.server.process.send_signal(signal.SIGCONT)
            time.sleep(0.5)
        self._hang(hang)
        locked.ask_for_too_much()
        self._await_alerts(*ALERTS)

    def _hang(self, hang: Path) -> None:
        """Let the device hang until the alert fires, and others' steps wait for it in vain."""
        hang.touch()
        try:
            wait_until(lambda: self.server.metric('tenuto_state{tenuto_state="stalled"}'), "the device to hang")
            for _ in range(3):
                # Opened only now: sessions that wait for their first step may expire before it.
                waiting = [opened(self.server) for _ in range(2)]
                response = self.server.stub.StepBatch(batch(waiting, observations(len(waiting))))
                assert {error.error.reason for error in response.errors} == {pb.QUEUE_TIMEOUT}
                for session in waiting:
                    self.server.stub.CloseSession(pb.CloseSessionRequest(session_id=session.id))
            self._await_alerts("TenutoStalled", "TenutoStepsTurnedAway")
        finally:
            hang.unlink()

    def _await_metric(self, selector: str, value: float) -> None:
        wait_until(lambda: self.server.metric(selector) >= value, f"{selector} >= {value}", 90)

    def _await_alerts(self, *names: str, timeout_s: float = 45.0) -> None:
        """Wait until they have fired; a test says later which did not."""
        deadline_s = time.monotonic() + timeout_s
        while not set(names) <= self.prometheus.fired().keys() and time.monotonic() < deadline_s:
            time.sleep(0.2)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with ExitStack() as stack:
        yield Scene(tmp_path_factory.mktemp("observability"), stack)


# ---------------------------------------------------------------------------------------------- files


def test_promtool_accepts_the_configuration_and_the_rules() -> None:
    assert "SUCCESS" in promtool("check", "config", "prometheus.yml")
    assert "SUCCESS" in promtool("check", "rules", "alerts.yml")


def test_every_alert_fires_and_stays_silent_in_its_unit_tests() -> None:
    assert "SUCCESS" in promtool("test", "rules", "alerts.test.yml")


# ---------------------------------------------------------------------------------------------- live


def test_every_alert_fires_on_what_it_is_there_for(scene: Scene) -> None:
    fired = scene.prometheus.fired()
    assert ALERTS.keys() - fired.keys() == set()
    assert scene.silent_instance in [labels["instance"] for labels in fired["TenutoServerDown"]]
    assert [labels["instance"] for labels in fired["TenutoNoPolicy"]] == [scene.instance]
    assert {labels["reason"] for labels in fired["TenutoVersionRefused"]} == {"broken", "mismatch"}
    now = {labels["alertname"] for labels, _ in scene.prometheus.query('ALERTS{alertstate="firing"}')}
    assert "TenutoNoPolicy" not in now and "TenutoServerDown" in now


def test_the_texts_of_alerts_name_labels_that_the_alerts_have(scene: Scene) -> None:
    fired = scene.prometheus.fired()
    for name, rule in ALERTS.items():
        used = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
        for labels in fired.get(name, []):
            assert used <= labels.keys(), name


def test_every_query_of_the_dashboard_gives_a_number_and_the_labels_of_its_legend(scene: Scene) -> None:
    def emptiness(expression: str, legend: str) -> str | None:
        result = scene.prometheus.query(expression)
        if not any(math.isfinite(value) for _, value in result):
            return f"gives {result}"
        unnamed = [labels for labels, _ in result if not labels.keys() >= set(re.findall(r"{{(\w+)}}", legend))]
        return f"has no {legend} in {unnamed[0]}" if unnamed else None

    # The load comes round: what is empty now may not be in two seconds.
    missing, deadline_s = dashboard_queries(), time.monotonic() + 10
    while missing and time.monotonic() < deadline_s:
        missing = [query for query in missing if emptiness(*query[1:])]
    assert not [f"{title}: {expression} {emptiness(expression, legend)}" for title, expression, legend in missing]


def test_every_selector_has_found_a_series(scene: Scene) -> None:
    expressions: Iterable[str] = [rule["expr"] for rule in RULES] + [e for _, e, _ in dashboard_queries()]
    used = sorted({selector for expression in expressions for selector in selectors(expression)})
    assert len(used) > 20
    assert not [s for s in used if not scene.prometheus.query(f"last_over_time({s}[1h])")]


def test_every_variable_of_the_dashboard_has_values(scene: Scene) -> None:
    asked: list[str] = []
    for variable in json.loads(DASHBOARD.read_text())["templating"]["list"]:
        if variable["type"] == "query":
            selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"]).groups()
            assert any(label in labels for labels, _ in scene.prometheus.query(selector)), variable["name"]
            asked.append(variable["name"])
    assert asked == ["instance", "policy"]


def test_a_scrape_under_load_passes_promtools_lint(scene: Scene) -> None:
    assert promtool("check", "metrics", text=scene.server.http("/metrics")[1]) == ""
