"""Builds both images and runs what docker-compose.yml says about them, without a Docker engine or a registry.

    make image-test     (as root, on Debian: apt-get install --no-install-recommends buildah podman runc debootstrap
                         netavark aardvark-dns iptables)

The base image is a fresh Debian with Python, made by debootstrap, or --base-image. Everything lies in a folder of its
own, which is deleted at the end: no other container or image on the machine is seen or touched. Exits with 0 where all
holds, or where this machine cannot run containers, which it says; with 1 and the logs where something fails.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = "tenuto-image-test"
TARGETS = ("server", "trainer")
SERVICES = ("server", "trainer", "player-batch", "player-stream")
NEEDED = ("buildah", "podman", "runc", "debootstrap", "podman-compose", "hadolint", "check-jsonschema")
ENV = "popgym-RepeatPreviousEasy-v0"
USER = 10001
BASE_PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
BEGAN_S = time.monotonic()


class Skipped(Exception):
    """This machine cannot run the test; the text says why."""


class Failed(Exception):
    """Something does not hold; the text says what."""


def say(text: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"[{time.monotonic() - BEGAN_S:6.1f} s] {text}", flush=True)


def require(holds: bool, what: str) -> None:
    """Print what holds, or raise Failed with it."""
    if not holds:
        raise Failed(what)
    say(f"  ok: {what}")


def run(*command: str | Path, check: bool = True) -> str:
    """Run a command to its end and return what it wrote, both streams. Raises Failed where it fails."""
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if check and ended.returncode:
        raise Failed(f"{' '.join(map(str, command))} ended with {ended.returncode}:\n{ended.stdout[-3000:]}")
    return ended.stdout


def show(*command: str | Path, lines: str) -> None:
    """Run a long command and print those of its lines that match, as they come. Raises Failed where it fails."""
    last: list[str] = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = [*last[-30:], line]
            if re.search(lines, line):
                say(f"  {line.strip()[:110]}")
    if process.returncode:
        raise Failed(f"{command[0]} {command[1]} ended with {process.returncode}:\n{''.join(last)}")


def wait_for(what: str, is_so: Callable[[], bool], limit_s: float) -> float:
    """Wait until it is so and return the seconds that it took. Raises Failed at the limit."""
    began_s = time.monotonic()
    while not is_so():
        if time.monotonic() - began_s > limit_s:
            raise Failed(f"{what}: not within {limit_s:g} s")
        time.sleep(0.1)
    took_s = time.monotonic() - began_s
    say(f"  ok: {what} ({took_s:.1f} s)")
    return took_s


# The machine.


def look_at_the_machine() -> None:
    """Raise Skipped where no container can run."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise Skipped("it needs Linux and root")
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        raise Skipped(f"not installed: {', '.join(missing)}")
    if "overlay" not in Path("/proc/filesystems").read_text():
        raise Skipped("the kernel has no overlay file system")
    if subprocess.run(["unshare", "--mount", "--pid", "--net", "--fork", "true"], capture_output=True).returncode:
        raise Skipped("the kernel allows no namespaces here")


def private_podman(folder: Path) -> None:
    """Point podman and buildah, for this process and its children, to a storage of their own."""
    storage, containers = folder / "storage.conf", folder / "containers.conf"
    storage.write_text(f'[storage]\ndriver = "overlay"\nrunroot = "{folder}/run"\ngraphroot = "{folder}/graph"\n')
    containers.write_text(
        '[containers]\ndefault_ulimits = ["nofile=1024:20000", "nproc=4096:32768"]\n'
        f'[network]\nnetwork_backend = "netavark"\nnetwork_config_dir = "{folder}/networks"\n'
        # systemd may be absent, and crun fails on hybrid cgroups.
        '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
        f'tmp_dir = "{folder}/run/libpod"\n'
    )
    os.environ.update(CONTAINERS_STORAGE_CONF=str(storage), CONTAINERS_CONF=str(containers))


def pip_settings() -> dict[str, str]:
    """Return pip's settings on this machine, from its files and its environment."""
    settings: dict[str, str] = {}
    for line in run(sys.executable, "-m", "pip", "config", "list").splitlines():
        if found := re.fullmatch(r"(?:global|install|:env:)\.([\w-]+)=(.+)", line):
            settings[found[1]] = " ".join(str(ast.literal_eval(found[2])).split())
    return settings


def pip_volumes(folder: Path, settings: Mapping[str, str]) -> list[str]:
    """Return buildah's options that give pip in a build this machine's settings; nothing of it stays in the image."""
    conf = folder / "pip.conf"
    conf.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    words = [word.removeprefix("file://") for value in settings.values() for word in value.split()]
    paths = [Path(word) for word in words if word.startswith("/") and Path(word).exists()]
    folders = {path.parent if path.name == "simple" else path for path in paths}
    return [f"--volume={conf}:/etc/pip.conf:ro", *(f"--volume={path}:{path}:ro" for path in sorted(folders))]


# Images.


def make_base(folder: Path) -> str:
    """Make a Debian with Python, and return the image's name."""
    name = "localhost/python:3.11-slim"
    if run("podman", "images", "--quiet", name).strip():
        return name
    root = folder / "base"
    remove(root)
    steps = "Retrieving InRelease|Extracting apt|Unpacking the base|Configuring (dpkg|python3-pip)|successfully"
    show("debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", "bookworm", root, lines=steps)
    with subprocess.Popen(["tar", "-C", root, "--one-file-system", "-c", "."], stdout=subprocess.PIPE) as tar:
        path = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        command = ["podman", "import", "--quiet", "--change", path, "-", name]
        subprocess.run(command, stdin=tar.stdout, stdout=subprocess.DEVNULL, check=True)
    remove(root)
    return name


def build(target: str, base: str, volumes: list[str], torch_index: str | None) -> None:
    """Build one image from the Dockerfile."""
    began_s = time.monotonic()
    arguments = [f"--build-arg=BASE_IMAGE={base}"]
    arguments += [] if torch_index is None else [f"--build-arg=TORCH_INDEX={torch_index}"]
    # Without --format docker the HEALTHCHECK is dropped.
    show("buildah", "bud", "--layers", "--isolation=chroot", "--network=host", "--format=docker", *arguments, *volumes,
         f"--target={target}", "--tag", f"localhost/tenuto-{target}:dev", ".", lines="STEP.*(FROM|RUN)")  # fmt: skip
    (image,) = json.loads(run("podman", "image", "inspect", f"localhost/tenuto-{target}:dev"))
    say(f"  built in {time.monotonic() - began_s:.0f} s, {image['Size'] / 1e6:.0f} MB")
    require(image["Config"]["User"] == f"{USER}:{USER}", f"{target} runs as {USER}, a user without a name")
    entrypoint = image["Config"]["Entrypoint"]
    require("-c" not in entrypoint, f"{target}'s entry point is no shell: {' '.join(entrypoint)}")


# Containers.


def compose(*arguments: str) -> str:
    """Run podman-compose on the project's file."""
    # There is no systemd to run the health checks: the test calls them.
    options = ("-p", PROJECT, "--in-pod=false", "--podman-run-args=--health-interval=disable")
    return run("podman-compose", *options, "-f", ROOT / "docker-compose.yml", *arguments)


def container(service: str) -> str:
    """Return the name of a service's container."""
    return f"{PROJECT}_{service}_1"


def inside(service: str, script: str) -> str:
    """Run a shell script in a service's container and return its output, whatever its exit code."""
    return run("podman", "exec", container(service), "sh", "-c", script, check=False).strip()


def logs(service: str) -> str:
    """Return what a service printed."""
    return run("podman", "logs", container(service), check=False)


def show_logs(service: str, lines: str) -> None:
    """Print the lines of a service's log that match, with their times."""
    for line in run("podman", "logs", "--timestamps", container(service), check=False).splitlines():
        if re.search(lines, line):
            stamp, text = line.split(" ", 1)
            say(f"  {stamp[11:23]} {text.split(' tenuto: ')[-1]}")


def is_healthy(name: str) -> bool:
    """Call the image's health check."""
    return subprocess.run(["podman", "healthcheck", "run", name], capture_output=True, check=False).returncode == 0


def process_of(service: str) -> int:
    """Return the host's id of a container's first process, 0 where there is none."""
    return int(run("podman", "inspect", "--format", "{{.State.Pid}}", container(service)))


def stop(service: str) -> tuple[float, int]:
    """Send SIGTERM as compose does; returns the seconds until the end and the exit code."""
    began_s = time.monotonic()
    compose("stop", service)
    took_s = time.monotonic() - began_s
    return took_s, int(run("podman", "inspect", "--format", "{{.State.ExitCode}}", container(service)))


def check_hardening(service: str) -> None:
    """Look from inside whether what the compose file says has come true."""
    status = dict(line.split(":\t", 1) for line in inside(service, "cat /proc/1/status").splitlines() if ":\t" in line)
    require(status["Uid"].split()[0] == str(USER), f"{service}: process 1 is of user {USER}")
    capabilities = [status[name] for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")]
    require(not any(int(mask, 16) for mask in capabilities), f"{service}: no capability, and none to be had")
    require(status["NoNewPrivs"] == "1", f"{service}: no new privileges")
    reply = inside(service, "for f in /x /opt/x /opt/venv/x /opt/tenuto/x; do touch $f; done")
    require(reply.count("Read-only file system") == 4, f"{service}: the root file system is read-only")
    require(not inside(service, "find / -xdev -type f -perm /6000 2>/dev/null"), f"{service}: nothing changes its user")
    limits = json.loads(run("podman", "inspect", container(service)))[0]["HostConfig"]
    require(
        limits["Memory"] > 0 and limits["PidsLimit"] > 0 and limits["NanoCpus"] + limits["CpuQuota"] > 0,
        f"{service}: at most {limits['Memory'] / 2**30:g} GB, {limits['PidsLimit']} processes",
    )


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def scrape(port: int) -> dict[str, float]:
    """Read /metrics: sums over labels, by name. Empty where nobody answers."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # Whatever proxy is set, this is local.
    try:
        with direct.open(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
            text = response.read().decode()
    except (urllib.error.URLError, OSError):
        return {}
    sums: dict[str, float] = {}
    for name, value in re.findall(r"^(\w+)(?:\{[^}]*\})? (\S+)$", text, re.MULTILINE):
        sums[name] = sums.get(name, 0.0) + float(value)
    return sums


# The story.


def bring_up(metrics_port: int) -> None:
    """Start server and trainer; ends when the server answers steps and has seen a second version."""
    say("starting the server, without a policy")
    compose("up", "--detach", "--no-build", "server")
    wait_for("the server listens", lambda: "listening on" in logs("server"), 60)
    check_hardening("server")
    require(not is_healthy(container("server")), "the health check says no: there is no policy")

    say("starting the trainer")
    compose("up", "--detach", "--no-build", "trainer")
    wait_for("the trainer's first version makes the server healthy", lambda: is_healthy(container("server")), 120)
    check_hardening("trainer")
    wait_for(
        "the server loads two more versions", lambda: scrape(metrics_port).get("tenuto_newest_version", 0) >= 3, 120
    )


def play(port: int, metrics_port: int) -> None:
    """Play in the compose file's players and from the host, and compare with what the server counted."""
    say("starting the players")
    compose("up", "--detach", "--no-build", "player-batch", "player-stream")
    for service in ("player-batch", "player-stream"):
        check_hardening(service)
    wait_for("16 environments play", lambda: scrape(metrics_port).get("tenuto_sessions", 0) == 16, 60)

    say("playing from the host")
    player = Path(sys.executable).parent / "tenuto-play"
    output = run(player, "--env", ENV, "--server", f"127.0.0.1:{port}", "--episodes", "20", "--num-envs", "4")
    for line in output.splitlines()[-3:]:
        say(f"  {line}")
    metrics = scrape(metrics_port)
    for name in ("steps_total", "episodes_total", "versions_loaded_total", "newest_version"):
        say(f"  tenuto_{name} {metrics[f'tenuto_{name}']:g}")
    require(metrics["tenuto_episodes_total"] > 20, "/metrics counts the episodes")
    require(metrics.get("tenuto_versions_refused_total", 0) == 0, "no version was refused")
    for service in ("server", "trainer"):
        listing = "ls -R %s | grep -c '[.]nbc$'"
        made, now = (inside(service, listing % folder) for folder in ("/opt/tenuto/numba", "/tmp/numba"))
        require(made == now != "0", f"{service}: all {now} compiled functions came with the image")


def end_training() -> None:
    """Stop the trainer with SIGTERM."""
    say("stopping the trainer")
    took_s, code = stop("trainer")
    show_logs("trainer", "stopped: |serves version")
    require(code == 0, f"SIGTERM ends it in {took_s:.1f} s with exit code 0")


def restart_under_load(metrics_port: int) -> None:
    """Stop the server while the players play, start it again, kill it, and see every episode go on."""
    say("stopping the server while 16 environments play")
    took_s, code = stop("server")
    show_logs("server", "draining: |: stopped")
    require(code == 0, f"SIGTERM ends it in {took_s:.1f} s with exit code 0")

    say("starting it again")
    compose("start", "server")
    wait_for_players(metrics_port)

    say("killing it with SIGKILL")
    pid = process_of("server")
    os.kill(pid, signal.SIGKILL)
    wait_for("it is started again by its restart policy", lambda: process_of("server") not in (0, pid), 30)
    wait_for_players(metrics_port)
    for service in ("player-batch", "player-stream"):
        took_s, code = stop(service)
        require(code == 0, f"{service} ends on SIGTERM in {took_s:.1f} s with exit code 0")


def wait_for_players(metrics_port: int) -> None:
    """Wait until the server is healthy and the players, whom nobody touched, play on."""
    wait_for("it is healthy", lambda: is_healthy(container("server")), 60)
    restored = scrape(metrics_port).get("tenuto_sessions_restored_total", 0)
    require(restored == 16, f"{restored:g} sessions came back from the store")
    wait_for("the players go on by themselves", lambda: scrape(metrics_port).get("tenuto_sessions", 0) == 16, 120)


def time_starts() -> None:
    """Time the server's start with the compiled code of the image, and where it is of no use."""
    say("timing the start of the server, from the return of podman run to healthy")
    name = f"{PROJECT}_start"
    hardened = ["--read-only", "--tmpfs=/tmp", "--cap-drop=all", "--security-opt=no-new-privileges", "--network=none",
                "--health-interval=disable", f"--volume={PROJECT}_repository:/repository:ro"]  # fmt: skip
    nowhere, other = ["--env=NUMBA_CACHE_DIR=/nowhere"], ["--env=NUMBA_CPU_NAME=x86-64-v2"]
    starts = (("compiled code from the image", []), ("no folder for it", nowhere), ("code of another CPU", other))
    for what, more in 2 * starts:
        run("podman", "run", "--detach", "--name", name, *hardened, *more, "localhost/tenuto-server:dev",
            "--insecure")  # fmt: skip
        wait_for(what, lambda: is_healthy(name), 120)
        warned = "compiled anew" in run("podman", "logs", name)
        require(warned == (more is nowhere), f"the log {'says why' if warned else 'has no complaint'}")
        run("podman", "rm", "--force", name)


def remove(folder: Path) -> None:
    """Delete the folder, but never through a mount: what lies behind one may be the host's."""
    for mounted in reversed(mounts_below(folder)):
        run("umount", mounted, check=False)
    if left := mounts_below(folder):
        say(f"  {folder} stays, for these are mounted: {', '.join(left)}")
    else:
        shutil.rmtree(folder, ignore_errors=True)


def mounts_below(folder: Path) -> list[str]:
    """Return what is mounted below a folder, in the order of mounting."""
    points = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    return [point for point in points if Path(point).is_relative_to(folder)]


@contextmanager
def cleaned_up(folder: Path, keep: bool) -> Iterator[None]:
    """Remove containers, volumes and, unless told to keep it, everything else; print the logs after a failure."""
    try:
        yield
    except Failed:
        for service in SERVICES:
            print(f"\n--- {service} ---\n{logs(service)[-3000:]}", flush=True)
        raise
    finally:
        say("cleaning up")
        run("podman", "rm", "--all", "--force", check=False)
        run("podman", "volume", "prune", "--force", check=False)
        run("podman", "network", "prune", "--force", check=False)
        if keep:
            say(f"  images stay in {folder}")
        else:
            run("podman", "rmi", "--all", "--force", check=False)
            remove(folder)


def main() -> None:
    """Run the whole test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-image", help="default: made by debootstrap")
    parser.add_argument("--below", type=Path, default=Path("/var/tmp"), help="where to make its folder of 8 GB")
    parser.add_argument("--keep", action="store_true", help="leave the images there: the next run is faster")
    options = parser.parse_args()
    folder: Path = options.below.absolute() / PROJECT
    try:
        look_at_the_machine()
        folder.mkdir(parents=True, exist_ok=True)
        private_podman(folder)
        with cleaned_up(folder, options.keep):
            run("podman", "rm", "--all", "--force")  # What a run that was killed left behind.
            test(folder, options.base_image)
    except Skipped as reason:
        print(f"image-test skipped: {reason}")
    except Failed as failure:
        sys.exit(f"image-test failed: {failure}")


def test(folder: Path, base_image: str | None) -> None:
    """Tell the story."""
    say("linting")
    run("hadolint", "Dockerfile")
    run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", *sorted(ROOT.glob("docker-compose*.yml")))
    say("making the base image")
    base = base_image or make_base(folder)
    if "is here" not in (reply := run("podman", "run", "--rm", "--network=none", base, "echo", "is here", check=False)):
        raise Skipped(f"podman cannot run a container here: {reply.strip()[-300:]}")
    settings = pip_settings()
    volumes = pip_volumes(folder, settings)
    links = [Path(word) for word in settings.get("find-links", "").split()]
    has_torch = any(link.is_dir() and list(link.glob("torch-*+cpu-*.whl")) for link in links)
    for target in TARGETS:
        say(f"building {target}")
        build(target, base, volumes, "" if has_torch else None)

    port, metrics_port = free_port(), free_port()
    os.environ.update(TENUTO_PORT=str(port), TENUTO_METRICS_PORT=str(metrics_port), TENUTO_ENV=ENV)
    bring_up(metrics_port)
    play(port, metrics_port)
    end_training()
    restart_under_load(metrics_port)
    time_starts()
    say("all holds")


if __name__ == "__main__":
    main()
