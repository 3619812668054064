"""``tenuto-bench``: measures a server under load, and checks its answers.

Each case runs real client processes in closed loops: a session sends its next step when it has the action of the one
before. Sampled sessions are computed again from the policy's weights and must match.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tenuto_bench.cases import MODES, Case, Outcome
from tenuto_bench.clients import SAMPLED, Clients, LoadError, outcome
from tenuto_bench.replay import count_wrong
from tenuto_bench.served import MEMORIES, Served, ServerError, own_server
from tenuto_client.access_files import AccessFiles, add_access_flags

PROCESS_CPU, BATCHES, ROWS = "process_cpu_seconds_total", "tenuto_batch_rows_count", "tenuto_batch_rows_sum"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``tenuto-bench``. Exits with 1 where steps failed or answers were wrong."""
    flags = _parse(argv)
    # The table goes to standard output, so that it can be kept; progress does not.
    console, progress = Console(width=None if sys.stdout.isatty() else 140), Console(stderr=True)
    cases = [
        Case(
            mode, policy, sessions, min(flags.processes, sessions), min(flags.rows, sessions) if mode == "batch" else 1
        )
        for policy, mode, sessions in itertools.product(flags.policy, flags.mode, flags.sessions)
    ]
    outcomes: list[Outcome] = []
    try:
        with _server(flags) as served:
            for case in track(cases, "measuring", console=progress, transient=True):
                outcomes.append(measure(served, case, flags.warmup, flags.seconds))
    except (ServerError, LoadError) as error:
        sys.exit(f"tenuto-bench: {error}")
    except KeyboardInterrupt:
        pass
    console.print(table_of(outcomes))
    if flags.json:
        flags.json.write_text(json.dumps([asdict(o) for o in outcomes], indent=2) + "\n")
    if bad := sum(o.wrong + sum(o.errors.values()) for o in outcomes):
        sys.exit(f"tenuto-bench: {bad} steps failed or were answered wrongly")


def measure(served: Served, case: Case, warmup_s: float, seconds: float, sampled: int = SAMPLED) -> Outcome:
    """Run one case and check the answers to ``sampled`` sessions of each process. Raises LoadError or ServerError."""
    clients = Clients(served.address, case, warmup_s, seconds, sampled, access_files=served.access_files)
    try:
        names = (PROCESS_CPU, BATCHES, ROWS) if served.metrics_url else ()
        clients.warm_up()
        before = [served.metric(name) for name in names]
        shares = clients.shares()
        spent = [served.metric(name) - b for name, b in zip(names, before, strict=True)]
    finally:
        clients.close()
    found = outcome(case, shares, spent[0] if spent else None, spent[2] / max(spent[1], 1) if spent else None)
    if served.repository is not None and sampled:
        recordings = [recording for share in shares for recording in share.recordings]
        found.checked, found.wrong = count_wrong(recordings, served.repository, case.policy)
    return found


def table_of(outcomes: Sequence[Outcome]) -> Table:
    """One row per case."""
    table = Table(title="µs: CPU per step; checked: steps computed again / of them different")
    table.add_column("policy, mode")
    for column in (
        "sessions", "per process", "per call", "steps/s", "p50 / p90 / p99 / max ms", "server µs", "client µs", "batch",
        "errors", "checked",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for o in outcomes:
        case = o.case
        table.add_row(
            f"{case.policy}, {case.mode}", f"{case.sessions}", f"{case.sessions / case.processes:g}", f"{case.rows}",
            f"{o.steps_per_s:,.0f}", f"{o.p50_ms:.2f} / {o.p90_ms:.2f} / {o.p99_ms:.2f} / {o.max_ms:.1f}",
            _figure(o.server_us), _figure(o.client_us), _figure(o.batch_rows), str(sum(o.errors.values())),
            f"{o.checked:,} / {o.wrong}" if o.checked else "–",
        )  # fmt: skip
    return table


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}"


@contextmanager
def _server(flags: argparse.Namespace) -> Generator[Served]:
    if flags.address is None:
        with own_server() as served:
            yield served
    else:
        url = f"http://{flags.metrics}/metrics" if flags.metrics else None
        yield Served(flags.address, url, flags.repository, access_files=_access_files(flags))


def _access_files(flags: argparse.Namespace) -> dict[str, str]:
    paths = {of_access.name: getattr(flags, of_access.name) for of_access in fields(AccessFiles)}
    return {name: str(path) for name, path in paths.items() if path is not None}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tenuto-bench",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--address", metavar="HOST:PORT", help="the server; without it one is started, here")
    parser.add_argument("--metrics", metavar="HOST:PORT", help="its metrics port, for its CPU and batch sizes")
    parser.add_argument("--repository", type=Path, metavar="DIR", help="its checkpoints, to check its answers")
    parser.add_argument("--policy", nargs="+", default=list(MEMORIES), help="names (default: dnc frameconv)")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES), help="(default: all three)")
    parser.add_argument("--sessions", nargs="+", type=_positive, default=[1, 16, 64, 256], metavar="N")
    parser.add_argument("--processes", type=_positive, default=1, metavar="N", help="client processes (default: 1)")
    parser.add_argument(
        "--rows", type=_positive, default=256, metavar="N", help="per call in mode batch (default: 256)"
    )
    parser.add_argument("--seconds", type=_seconds, default=5.0, help="of each case (default: 5)")
    parser.add_argument("--warmup", type=_seconds, default=1.0, help="seconds before it (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    add_access_flags(parser)
    flags = parser.parse_args(argv)
    if flags.address is None and (flags.metrics or flags.repository):
        parser.error("--metrics and --repository are of the server at --address, which is missing")
    try:
        access = AccessFiles(**{name: Path(path) for name, path in _access_files(flags).items()})
        access.token()
        access.credentials()
    except ValueError as error:
        parser.error(str(error))
    if flags.json and not flags.json.absolute().parent.is_dir():
        parser.error(f"--json: got {flags.json}, whose folder does not exist")
    if flags.repository and not flags.repository.is_dir():
        parser.error(f"--repository: got {flags.repository}, which is no folder")
    return flags


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}, expected more than 0")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected at least 1")
    return value


if __name__ == "__main__":
    main()
