"""Asks a server whether it serves what was published, on a thread of its own: training never waits for an answer.

``tenuto-train --server HOST:PORT`` makes one. The training loop tells it every version and looks for news in between;
at the end it waits a few seconds for the last answer. A server that is down is news, too, but no error.
"""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from tenuto_proto.errors import STATUS_DETAILS_KEY, decode_status
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_proto.v1.policy_pb2_grpc import PolicyServiceStub
from tenuto_trainer.config import TrainConfig
from tenuto_trainer.errors import RefusedError, TrainConfigError

TIMEOUT_S = 2.0
"""That a server may take to answer."""
PAUSE_S = 0.3
"""Between two questions about the same version."""
PATIENCE_S = 30.0
"""That a server may take to load a version before that is news, and that the end of a run waits for it."""
_CHANNEL_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(frozen=True)
class Answer:
    """What the server said last."""

    version: int = 0
    """Newest published version when it was asked."""
    serves: int = 0
    """The version that new episodes begin with; 0: none."""
    iteration: int = 0
    """Training iteration that this version is of."""
    refused: dict[int, str] = field(default_factory=dict[int, str])
    """Why it will not serve these versions."""
    failure: str | None = None
    """Why it did not answer; then the rest is what it had said before."""

    def settles(self, version: int, iteration: int) -> bool:
        """Whether it says what became of a version of that iteration: refused or served."""
        return version in self.refused or (self.serves, self.iteration) == (version, iteration)


class ServerWatch:
    """Follows one policy on one server. Made and used by the training's thread; a context manager.

    Without an address it starts nothing, knows nothing and says nothing.
    """

    def __init__(
        self,
        address: str | None,
        policy_name: str,
        *,
        patience_s: float = PATIENCE_S,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
    ) -> None:
        """``credentials``: None asks without encryption. ``token``: says who asks."""
        self._credentials = credentials
        self._metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        self._address, self._policy_name, self._patience_s = address, policy_name, patience_s
        # Guards what follows, which both threads use, and is notified whenever it changes.
        self._changed = threading.Condition()
        self._published: list[int] = []
        self._iteration = 0
        self._late_at_s = 0.0
        self._answer = Answer()
        self._news: list[str] = []
        self._noted: set[int] = set()
        self._stopped = False
        if address is not None:
            threading.Thread(target=self._run, args=(address,), name="tenuto-server-watch", daemon=True).start()

    def __enter__(self) -> ServerWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop asking. A question under way is not waited for."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def published(self, version: int | None, iteration: int) -> None:
        """Say what the newest version is, and of which iteration; does not wait. Saying it again does nothing."""
        with self._changed:
            if version is not None and version != self._newest:
                self._published.append(version)
                self._iteration = iteration
                self._late_at_s = time.monotonic() + self._patience_s
                self._changed.notify_all()

    def news(self) -> list[str]:
        """Return what is worth telling since the last call; does not wait."""
        with self._changed:
            news, self._news = self._news, []
            return news

    def scalars(self) -> dict[str, float]:
        """Return curves for TensorBoard: the version that is served, and how many of this run's are refused."""
        if self._address is None:
            return {}
        with self._changed:
            return {
                "checkpoint/served_version": float(self._answer.serves),
                "checkpoint/refused_versions": float(len(self._noted)),
            }

    def conclude(self) -> str | None:
        """Wait a bounded time for the answer about the newest version and say it; None without an address.

        Raises RefusedError where the server refuses that version.
        """
        with self._changed:
            if self._address is None:
                return None
            self._changed.wait_for(lambda: self._is_settled or self._is_down, self._patience_s)
            answer, version = self._answer, self._newest
            if version in answer.refused:
                raise RefusedError(f"{self._address} refuses version {version}: {answer.refused[version]}")
            if self._is_settled:
                return f"{self._address} serves version {answer.serves}"
            if self._is_down:
                return f"{self._address} does not answer ({answer.failure}): nobody knows if it serves v{version}"
            return self._late()

    @property
    def _newest(self) -> int:
        return self._published[-1] if self._published else 0

    @property
    def _is_settled(self) -> bool:
        return self._answer.settles(self._newest, self._iteration)

    @property
    def _is_down(self) -> bool:
        return self._answer.failure is not None and self._answer.version == self._newest

    def _late(self) -> str:
        served = (
            f", but version {self._answer.serves} of iteration {self._answer.iteration}" if self._answer.serves else ""
        )
        return f"{self._address} does not serve version {self._newest}{served}; is this its repository?"

    # ------------------------------------------------------------------ the thread

    def _run(self, address: str) -> None:
        with self._channel(address) as channel:
            stub = PolicyServiceStub(channel)
            while (version := self._next_question()) is not None:
                answer = _ask(stub, self._policy_name, self._metadata)
                with self._changed:
                    self._take(replace(answer, version=version))
                    self._changed.notify_all()

    def _channel(self, address: str) -> grpc.Channel:
        if self._credentials is None:
            return grpc.insecure_channel(address, _CHANNEL_OPTIONS)
        return grpc.secure_channel(address, self._credentials, _CHANNEL_OPTIONS)

    def _next_question(self) -> int | None:
        """Wait until there is a version to ask about, and return it; None at the end."""
        with self._changed:
            asked, pause_s = self._answer.version, None if self._is_settled else PAUSE_S
            self._changed.wait_for(lambda: self._stopped or self._newest != asked, pause_s)
            return None if self._stopped else self._newest

    def _take(self, answer: Answer) -> None:
        before, address = self._answer, self._address
        if answer.failure is not None:
            self._answer = replace(before, version=answer.version, failure=answer.failure)
            if before.failure is None:
                self._news.append(f"{address} does not answer ({answer.failure}); training goes on")
            return
        self._answer = answer
        if before.failure is not None:
            self._news.append(f"{address} answers again")
        # After that it is no news, but where the version before was refused.
        if (
            self._is_settled
            and answer.serves > before.serves
            and (before.serves == 0 or max(self._noted, default=0) > before.serves)
        ):
            self._news.append(f"{address} serves version {answer.serves}")
        for version in sorted(answer.refused.keys() & set(self._published) - self._noted):
            self._noted.add(version)
            self._news.append(f"{address} refuses version {version}: {answer.refused[version]}")
        if not self._is_settled and time.monotonic() >= self._late_at_s:
            self._late_at_s = float("inf")  # Once per version is enough.
            self._news.append(self._late())


def credentials_of(config: TrainConfig) -> grpc.ChannelCredentials | None:
    """Read the certificates to ask the server with; None where there are none. Raises TrainConfigError."""
    if config.server_ca_certificate is None:
        return None
    ca, key, certificate = (
        None if getattr(config, name) is None else _read(name, getattr(config, name))
        for name in ("server_ca_certificate", "server_client_key", "server_client_certificate")
    )
    return grpc.ssl_channel_credentials(ca, key, certificate)


def token_of(config: TrainConfig) -> str | None:
    """Read the token to ask the server with; None where there is none. Raises TrainConfigError, which quotes none."""
    if config.server_token_file is None:
        return None
    lines = _read("server_token_file", config.server_token_file).decode(errors="replace").splitlines()
    token = lines[0].strip() if lines else ""
    # gRPC's complaint about other characters would quote it.
    if not re.fullmatch(r"[A-Za-z0-9._~+/-]+=*", token):
        path = config.server_token_file
        raise TrainConfigError(f"server_token_file: got {path}, whose first line is no token")
    return token


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TrainConfigError(f"{name}: got {path}, which cannot be read ({error.strerror})") from None


def _ask(stub: PolicyServiceStub, policy_name: str, metadata: tuple[tuple[str, str], ...]) -> Answer:
    try:
        request = pb.GetPolicyRequest(policy_name=policy_name)
        reply = stub.GetPolicy(request, timeout=TIMEOUT_S, metadata=metadata)
    except grpc.RpcError as error:
        return _answer_of(error)
    return Answer(
        serves=reply.version,
        iteration=reply.training.iteration,
        refused={refused.version: refused.message for refused in reply.refused},
    )


def _answer_of(error: grpc.RpcError) -> Answer:
    """Read an error: of a policy that is not served it may say which version was refused."""
    assert isinstance(error, grpc.Call)
    metadata: Any = error.trailing_metadata() or ()
    details = next((value for key, value in metadata if key == STATUS_DETAILS_KEY), b"")
    try:
        found = decode_status(details)
    except DecodeError:  # Not a server of ours.
        found = None
    if found is None or found.reason != pb.POLICY_UNKNOWN:
        return Answer(failure=error.code().name)
    version = found.metadata.get("refused_version", "")
    return Answer(refused={int(version): found.metadata.get("refused_message", "")} if version.isdecimal() else {})
