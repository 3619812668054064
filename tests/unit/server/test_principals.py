"""The file of principals, the command that keeps it, and who a caller is by it."""

from __future__ import annotations

import asyncio
import json
import timeit
from pathlib import Path
from typing import Any

import pytest

from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server import tokens
from tenuto_server.authentication import Authentication
from tenuto_server.config import ServerConfig
from tenuto_server.errors import ConfigurationError, Refusal
from tenuto_server.principals import ANYONE, Entry, Principal, parse, to_text
from tenuto_server.secret_files import read_file


class Context:
    """What authentication sees of a call."""

    def __init__(self, *headers: tuple[str, Any], identities: list[bytes] | None = None) -> None:
        self._headers, self._identities = headers, identities

    def invocation_metadata(self) -> tuple[tuple[str, Any], ...]:
        return (("user-agent", "test"), *self._headers)

    def peer_identities(self) -> list[bytes] | None:
        return self._identities


def bearing(token: str, scheme: str = "Bearer ") -> Context:
    return Context(("authorization", scheme + token))


def entry(name: str, *made: str, **fields: Any) -> Entry:
    return Entry(Principal(name, **fields), tuple(tokens.digest_of(token) for token in made))


def text(**fields: Any) -> bytes:
    return json.dumps({"format_version": 1, "principals": [{"name": "a", **fields}]}).encode()


# ------------------------------------------------------------------ the file


def test_what_is_written_is_what_is_read() -> None:
    entries = [entry("robot-7", "x", "y", max_sessions=8, max_steps_per_s=0.5), entry("spiffe://lab/a", is_admin=True)]
    assert parse(to_text(entries).encode()) == entries


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"tenuto_leak", "not JSON at line 1"),
        (b'"\xfftenuto_leak"', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"format_version": 1, "principals": [], "tenuto_leak": 1}', "and nothing else"),
        (b'{"format_version": "tenuto_leak", "principals": []}', "format_version: expected 1"),
        (b'{"format_version": 1, "principals": {"tenuto_leak": 1}}', "principals: expected a list"),
        (b'{"format_version": 1, "principals": ["tenuto_leak"]}', r"principals\[0\]: expected an object"),
        (text(tenuto_leak=1), "1 unknown keys"),
        (text(name="tenuto leak"), "name: expected"),
        (text(name=7), "name: expected"),
        (text(tokens_sha256=["tenuto_leak"]), "tokens_sha256: expected a list of 64"),
        (text(tokens_sha256="tenuto_leak"), "tokens_sha256: expected a list"),
        (text(tokens_sha256=["0" * 64, "0" * 64]), "tokens_sha256: got one twice"),
        (text(admin="yes"), "admin: expected true or false"),
        (text(max_sessions=-1), "max_sessions: expected"),
        (text(max_sessions=True), "max_sessions: expected"),
        (text(max_steps_per_s=0), "max_steps_per_s: expected"),
        (text(max_steps_per_s=float("inf")), "max_steps_per_s: expected"),
        (b'{"format_version": 1, "principals": [{"name": "a"}, {"name": "a"}]}', "'a': got it twice"),
    ],
)
def test_a_file_that_is_not_right_is_refused_without_quoting_what_could_be_a_token(
    content: bytes, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        parse(content)
    assert "leak" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.unlink(), "cannot be read"),
        (lambda file: (file.unlink(), file.mkdir()), "expected a regular file"),
        (lambda file: file.write_bytes(b"x" * 2000), "more than 1000 bytes"),
        (lambda file: file.chmod(0o666), "mode 0666, expected one with which not all may write"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_refused(tmp_path: Path, spoil: Any, message: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    assert read_file("tokens", file, 1000) == b"x"
    spoil(file)
    with pytest.raises(ConfigurationError, match=message):
        read_file("tokens", file, 1000)


def test_the_command_prints_a_token_once_and_the_file_never_holds_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tokens.json"
    tokens.main(["add", str(file), "robot-7", "--max-sessions", "3"])
    first = capsys.readouterr().out.strip()
    tokens.main(["add", str(file), "robot-7", "--admin"])
    second = capsys.readouterr().out.strip()
    assert first.startswith("tenuto_") and len(first) > 43 and first != second
    assert first not in file.read_text() and second not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600 and list(tmp_path.iterdir()) == [file]
    (found,) = parse(file.read_bytes())
    assert found == Entry(Principal("robot-7", is_admin=True), (tokens.digest_of(first), tokens.digest_of(second)))
    tokens.main(["list", str(file)])
    shown = capsys.readouterr().out
    assert "robot-7 (admin)" in shown and found.tokens_sha256[0][:12] in shown
    tokens.main(["remove", str(file), "robot-7", "--token", found.tokens_sha256[0][:12]])
    assert parse(file.read_bytes())[0].tokens_sha256 == (tokens.digest_of(second),)
    tokens.main(["remove", str(file), "robot-7"])
    assert parse(file.read_bytes()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["add", "{}", "two words"], "name: got"),
        (["add", "{}", "a", "--max-sessions", "-1"], "max_sessions: expected"),
        (["add", "/nowhere/tokens.json", "a"], "cannot be written"),
        (["remove", "{}", "nobody"], "principal: got 'nobody'"),
        (["remove", "{}", "known", "--token", "abc"], "no hash of its tokens begins"),
    ],
)
def test_what_the_command_cannot_do_it_says_in_one_line_and_changes_nothing(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    file = tmp_path / "tokens.json"
    tokens.add(file, Principal("known"))
    before = file.read_bytes()
    with pytest.raises(SystemExit, match=message):
        tokens.main([argument.format(file) for argument in arguments])
    assert file.read_bytes() == before


# ------------------------------------------------------------------ who calls


def test_a_caller_is_who_its_token_says() -> None:
    authentication = Authentication([entry("alice", "one", "two"), entry("bob", "three", is_admin=True)])
    for token, name in (("one", "alice"), ("two", "alice"), ("three", "bob"), ("three", "bob")):
        assert authentication.principal(bearing(token)).name == name
    assert authentication.principal(bearing("one", "bearer  ")).name == "alice"
    wrong = [bearing("four"), bearing(""), bearing("one", ""), bearing("one", "Basic "), bearing("öne"), Context()]
    wrong += [Context(("authorization", b"Bearer one")), bearing("one\0"), bearing("alice")]
    for context in wrong:
        with pytest.raises(Refusal) as caught:
            authentication.principal(context)
        assert caught.value.reason == pb.UNAUTHENTICATED
    assert Authentication().principal(Context()) is ANYONE


def test_a_caller_without_a_token_is_who_its_certificate_says() -> None:
    by_certificate = Authentication(by_certificate=True)
    robot = Context(identities=[b"robot-7", b"other"])
    assert by_certificate.principal(robot) == Principal("robot-7")
    listed = Authentication([entry("robot-7", is_admin=True), entry("alice", "one")], by_certificate=True)
    assert listed.principal(robot).is_admin
    assert listed.principal(Context(("authorization", "Bearer one"), identities=[b"robot-7"])).name == "alice"
    for nobody in (Context(identities=[b"robot-8"]), Context(identities=[]), Context(identities=None)):
        with pytest.raises(Refusal):
            listed.principal(nobody)
    # A bad token is not mended by a good certificate.
    with pytest.raises(Refusal):
        listed.principal(Context(("authorization", "Bearer two"), identities=[b"robot-7"]))


async def test_a_change_of_the_file_reaches_streams_and_ends_those_whose_credential_is_gone() -> None:
    authentication = Authentication([entry("alice", "one", "two"), entry("bob", "three")])
    opened, ended = dict[str, Any](), dict[str, Refusal]()

    async def serve(token: str) -> None:
        try:
            with authentication.stream(bearing(token)) as caller:
                opened[token] = caller
                await asyncio.Event().wait()
        except Refusal as refusal:
            ended[token] = refusal

    tasks = [asyncio.create_task(serve(token)) for token in ("one", "two", "three")]
    await asyncio.sleep(0)
    # One token goes, the other's principal is an admin from now on, and bob's token is somebody else's.
    assert authentication.take([entry("alice", "two", is_admin=True), entry("carol", "three")]) == 2
    await asyncio.sleep(0)
    assert {token: refusal.reason for token, refusal in ended.items()} == dict.fromkeys(
        ("one", "three"), pb.UNAUTHENTICATED
    )
    assert opened["two"].principal.is_admin
    tasks[1].cancel()
    await asyncio.wait(tasks)
    assert tasks[1].cancelled() and authentication.take([]) == 0


def test_many_bad_headers_leave_nothing_behind() -> None:
    authentication = Authentication([entry("alice", "one")])
    for number in range(1000):
        with pytest.raises(Refusal):
            authentication.principal(bearing(f"wrong {number}"))
        assert authentication.principal(bearing("one", "Bearer" + " " * (number + 1))).name == "alice"
    assert len(authentication._cache) <= 4


def test_to_know_a_caller_again_costs_about_a_microsecond() -> None:
    authentication, context = Authentication([entry("alice", "one")]), bearing("one")
    # A bound that a busy machine keeps: hashing each time, or a lock, would not.
    assert min(timeit.repeat(lambda: authentication.principal(context), number=1000, repeat=20)) < 3e-6 * 1000


# ------------------------------------------------------------------ where it listens

TLS = {"tls_certificate": Path("c"), "tls_key": Path("k")}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_on_loopback_nothing_has_to_be_encrypted(host: str) -> None:
    assert ServerConfig(Path("r"), host=host).metrics_address == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org", "localhost.example.org"])
def test_elsewhere_it_takes_tls_or_a_flag(host: str) -> None:
    with pytest.raises(ConfigurationError, match=f"host: got '{host}'.*--tls-certificate.*--insecure"):
        ServerConfig(Path("r"), host=host)
    with pytest.raises(ConfigurationError, match=f"host: got '{host}'"):
        ServerConfig(Path("r"), host=host, tokens=Path("t"))
    assert ServerConfig(Path("r"), host=host, insecure=True).metrics_address == host
    # The metrics port is plain whatever the other one is.
    assert ServerConfig(Path("r"), host=host, **TLS).metrics_address == "127.0.0.1"
    with pytest.raises(ConfigurationError, match=f"metrics_host: got '{host}'.*--insecure"):
        ServerConfig(Path("r"), metrics_host=host, **TLS)
    assert ServerConfig(Path("r"), metrics_host=host, insecure=True, **TLS).metrics_address == host


@pytest.mark.parametrize("missing", [("tls_key",), ("tls_certificate",), ("tls_key", "tls_certificate")])
def test_half_of_tls_is_refused(missing: tuple[str, ...]) -> None:
    settings = {"tls_client_ca": Path("a"), **TLS}
    with pytest.raises(ConfigurationError, match=r"tls_\w+: got"):
        ServerConfig(Path("r"), **{name: path for name, path in settings.items() if name not in missing})
