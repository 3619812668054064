"""The whole loop on one machine, live in the terminal: a trainer publishes versions of a memory policy, a server loads
them under running episodes, and environments in processes of their own play against it.

Started by ``make demo``. Ends by itself, exits 0 exactly when the last version is clearly better than the first.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

# The action asked for is what was seen four steps before: without memory nobody is better than random.
ENV, POLICY = "popgym-RepeatPreviousEasy-v0", "repeat-previous"
LOWEST, HIGHEST = -1.0, 1.0
TRAIN = ["--memory", "dnc", "--max-seq-len", "16", "--batch-size", "2048", "--minibatch-size", "1024", "--lr", "2e-3"]
TRAIN += ["--seed", "0", "--publish-every", "10", "--publish-gain", "0.1"]
TRAIN += ["--stop-return", "0.85", "--stop-seconds", "170"]
PLAYERS = [["--num-envs", "8", "--transport", "batch"], ["--num-envs", "8", "--transport", "stream"]]
# Returns lie between -1 and 1, so with these numbers of episodes the standard error of the difference is 0.27 at the
# very worst, and 0.75 is no accident. The first version is short-lived: it gets one episode of each environment.
FIRST_EPISODES, LAST_EPISODES, CLEARLY_BETTER = 16, 100, 0.75
LIMIT_S = 250
FOLDER = Path("runs/demo")
"""Made anew by every run; what stood there is moved to runs/demo.old."""
WINDOW_S = 5.0


class DemoFailed(Exception):
    """Something other than the policy went wrong; the text says what."""


@dataclass
class Child:
    """One process of the demo; what it prints goes to a file."""

    name: str
    arguments: list[str]
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        program = Path(sys.executable).parent / self.arguments[0]
        # The environments play as fast as they can; on two cores they must not starve the trainer.
        polite = ["nice", "-n", "10"] if self.name.startswith("player") else []
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*polite, program, *self.arguments[1:]], stdout=log, stderr=log)

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return FOLDER / f"{self.name}.log"

    def last_line(self) -> str:
        """The last line that it printed."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "starting"

    def require_alive(self) -> None:
        """Raise DemoFailed with the end of its output if it has ended."""
        if (code := self.process.poll()) is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-12:])
            raise DemoFailed(f"{self.name} ended with exit code {code}; the end of {self.log}:\n{tail}")

    def stop(self) -> None:
        """Ask it to end, and make it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


Samples = dict[tuple[str, str], float]
"""(sample name, one label's value or "") -> value."""


def scrape(port: int) -> Samples:
    """Read the server's /metrics."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # Whatever proxy is set, this is local.
    with direct.open(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        families = text_string_to_metric_families(response.read().decode())
    samples: Samples = {}
    for family in families:
        for sample in family.samples:
            label = next((v for k, v in sample.labels.items() if k in ("version", "le")), "")
            key = (sample.name, label)
            samples[key] = samples.get(key, 0.0) + sample.value
    return samples


@dataclass
class View:
    """What the demo knows of the server: the last seconds for rates, and the returns of every version ever seen."""

    history: deque[tuple[float, Samples]] = field(default_factory=lambda: deque(maxlen=200))
    returns: dict[int, tuple[int, float]] = field(default_factory=dict)
    """version -> (episodes, mean return)."""

    def update(self, samples: Samples) -> None:
        """Take in a scrape."""
        now = time.monotonic()
        self.history.append((now, samples))
        while now - self.history[0][0] > WINDOW_S:
            self.history.popleft()
        for (name, label), count in samples.items():
            if name == "tenuto_episode_return_count" and count:
                total = samples["tenuto_episode_return_sum", label]
                self.returns[int(label)] = (int(count), total / count)

    def now(self, name: str) -> float:
        """The last value of a sample."""
        return self.history[-1][1].get((name, ""), 0.0)

    def num_labels(self, name: str) -> int:
        """How many rows a metric has."""
        return sum(found == name for found, _ in self.history[-1][1])

    def gained(self, name: str, label: str = "") -> float:
        """How much a counter grew within the window."""
        first, last = self.history[0][1], self.history[-1][1]
        return last.get((name, label), 0.0) - first.get((name, label), 0.0)

    def rate(self, name: str) -> float:
        """Growth per second within the window."""
        seconds = self.history[-1][0] - self.history[0][0]
        return self.gained(name) / seconds if seconds else 0.0

    def mean(self, histogram: str) -> float:
        """Mean of a histogram within the window."""
        count = self.gained(f"{histogram}_count")
        return self.gained(f"{histogram}_sum") / count if count else 0.0

    def quantile(self, histogram: str, q: float) -> float:
        """Quantile of a histogram within the window, linear inside a bucket."""
        labels = [label for name, label in self.history[-1][1] if name == f"{histogram}_bucket"]
        bounds = sorted(labels, key=float)
        wanted, below, lower = q * self.gained(f"{histogram}_count"), 0.0, 0.0
        for label in bounds:
            upto = self.gained(f"{histogram}_bucket", label)
            if upto >= wanted and upto > below:
                upper = lower if label == "+Inf" else float(label)
                return lower + (upper - lower) * (wanted - below) / (upto - below)
            below, lower = upto, float(label)
        return 0.0

    def percentiles_ms(self) -> tuple[float, float]:
        """p50 and p99 of a request inside the server, in milliseconds."""
        return 1e3 * self.quantile("tenuto_step_seconds", 0.5), 1e3 * self.quantile("tenuto_step_seconds", 0.99)

    def summary_line(self) -> str:
        """The figures in one line."""
        latest = max(self.returns, default=0)
        episodes, mean = self.returns.get(latest, (0, 0.0))
        p50, p99 = self.percentiles_ms()
        return (
            f"version {self.now('tenuto_newest_version'):.0f} served, {self.rate('tenuto_steps_total'):,.0f} steps/s, "
            f"batch {self.mean('tenuto_batch_rows'):.1f}, p50 {p50:.2f} ms, p99 {p99:.2f} ms, "
            f"return {mean:.3f} over {episodes} episodes of version {latest}"
        )


def picture(view: View, trainer: Child, elapsed_s: float, height: int) -> Panel:
    """What the terminal shows, in at most ``height`` lines."""
    figures = Table.grid(padding=(0, 3))
    for label, value in (
        (
            "served version",
            f"{view.now('tenuto_newest_version'):.0f}  ({view.num_labels('tenuto_version_sessions')} held)",
        ),
        ("sessions", f"{view.now('tenuto_sessions'):.0f}"),
        ("env steps/s", f"{view.rate('tenuto_steps_total'):,.0f}"),
        ("batch size", f"{view.mean('tenuto_batch_rows'):.1f}"),
        (
            "p50 / p99",
            "{:.2f} / {:.2f} ms".format(*(1e3 * view.quantile("tenuto_step_seconds", q) for q in (0.5, 0.99))),
        ),
    ):
        figures.add_row(Text(label, style="dim"), Text(value, style="bold"))
    returns = Table(box=None, header_style="dim")
    for heading in ("version", "episodes", "mean return"):
        returns.add_column(heading, justify="right")
    returns.add_column("")
    for version, (episodes, mean) in sorted(view.returns.items())[-max(1, height - 15) :]:
        bar = ProgressBar(total=HIGHEST - LOWEST, completed=mean - LOWEST, width=40)
        returns.add_row(str(version), str(episodes), f"{mean:.3f}", bar)
    waiting = "" if view.returns else "waiting for the first version and its first episodes"
    footer = Text(waiting or f"trainer: {trainer.last_line()}", style="dim", overflow="ellipsis", no_wrap=True)
    title = f"tenuto: {ENV}, {elapsed_s:.0f} s"
    return Panel(Group(figures, Text(), returns, Text(), footer), title=title, padding=(1, 2))


def wait_for_ports(server: Child) -> tuple[int, int]:
    """Return the gRPC and the metrics port once the server has said them."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        server.require_alive()
        said = re.search(r"listening on .*:(\d+), metrics on port (\d+)", server.log.read_text())
        if said:
            return int(said[1]), int(said[2])
        time.sleep(0.1)
    raise DemoFailed("the server did not start within 60 s")


def run(children: list[Child], console: Console) -> View:
    """Start everything, show it until the last version has been played enough, and return what was seen."""
    repository = str(FOLDER / "repository")
    server = Child("server", ["tenuto-serve", "--repository", repository, "--port", "0", "--metrics-port", "0"])
    children.append(server)
    port, metrics_port = wait_for_ports(server)
    address, logs = f"127.0.0.1:{port}", str(FOLDER / "tensorboard")
    # They wait for the first version, so that it is played however soon the second follows.
    players = [
        Child(f"player-{i}", ["tenuto-play", "--env", ENV, "--server", address, "--episodes", "0", *flags])
        for i, flags in enumerate(PLAYERS, 1)
    ]
    trainer = Child(
        "trainer",
        ["tenuto-train", "--env", ENV, "--policy", POLICY, "--repository", repository, "--log-dir", logs, *TRAIN],
    )
    children += [trainer, *players]
    console.print(f"server on {address}, metrics on http://127.0.0.1:{metrics_port}/metrics, logs in {FOLDER}/")

    view, began, said = View(), time.monotonic(), 0.0
    with Live(console=console, refresh_per_second=4, transient=False) as live:
        while True:
            elapsed = time.monotonic() - began
            for child in (server, *players):
                child.require_alive()
            view.update(scrape(metrics_port))
            if console.is_terminal:
                live.update(picture(view, trainer, elapsed, console.height))
            elif elapsed - said >= 5:
                console.print(f"{elapsed:4.0f} s: {view.summary_line()}", soft_wrap=True, highlight=False)
                said = elapsed
            if trainer.process.poll() not in (None, 0):
                trainer.require_alive()
            last = int(view.now("tenuto_newest_version"))
            trained = trainer.process.poll() == 0 and published(Path(repository)) == last
            if trained and view.returns.get(last, (0, 0.0))[0] >= LAST_EPISODES:
                return view
            if elapsed > LIMIT_S:
                return view
            time.sleep(0.25)


def published(repository: Path) -> int:
    """The newest version in the repository."""
    return max((int(p.name) for p in (repository / POLICY).glob("[0-9]*")), default=0)


def judge(view: View, console: Console) -> bool:
    """Print the summary; whether the last version is clearly better than the first."""
    if not view.returns:
        console.print("[red]no episode was finished[/red]")
        return False
    first, last = min(view.returns), max(view.returns)
    (first_n, first_mean), (last_n, last_mean) = view.returns[first], view.returns[last]
    better = first_n >= FIRST_EPISODES and last_n >= LAST_EPISODES and last_mean - first_mean >= CLEARLY_BETTER
    console.print(
        f"\nmean return of the first version ({first}): [bold]{first_mean:.3f}[/bold] over {first_n} episodes\n"
        f"mean return of the last version ({last}): [bold]{last_mean:.3f}[/bold] over {last_n} episodes\n"
        f"{view.now('tenuto_steps_total'):,.0f} steps were served, in episodes of {len(view.returns)} versions.\n",
        soft_wrap=True,
        highlight=False,
    )
    if not better:
        console.print(
            "[red]The last version is not clearly better: expected at least "
            f"{FIRST_EPISODES} and {LAST_EPISODES} episodes and a difference of at least {CLEARLY_BETTER}.[/red] "
            f"The logs are in {FOLDER}/.",
            soft_wrap=True,
        )
        return False
    repository = FOLDER / "repository"
    console.print(
        "[green]The last version is clearly better.[/green] To go on:\n"
        f"  .venv/bin/tenuto-serve --repository {repository}        serve what was trained\n"
        f"  .venv/bin/tenuto-play --env {ENV} --server 127.0.0.1:50051 --episodes 20   play against it\n"
        f"  .venv/bin/tensorboard --logdir {FOLDER / 'tensorboard'}        look at the training\n"
        "  docs/request.md        what happens to a step on its way",
        soft_wrap=True,
        highlight=False,
    )
    return True


def main() -> int:
    """Run the demo and return the exit code."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    console = Console()
    if FOLDER.exists():
        old = FOLDER.with_suffix(".old")
        shutil.rmtree(old, ignore_errors=True)
        FOLDER.rename(old)
        console.print(f"the last demo is kept in {old}/")
    FOLDER.mkdir(parents=True)
    children: list[Child] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        view = run(children, console)
    except DemoFailed as failure:
        console.print(f"[red]{failure}[/red]", highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    finally:
        for child in reversed(children):
            child.stop()
    return 0 if judge(view, console) else 1


if __name__ == "__main__":
    sys.exit(main())
