"""Many StepBatch requests over one StepStream, answered in any order; blocking API.

A connection that breaks, or that leaves a request unanswered for too long, is dropped with all its waiters: each gets
an error, and the next request opens a new connection. Nothing is resent here; retries are the programs' business.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from queue import SimpleQueue
from typing import Any

import grpc

from tenuto_client.errors import ClientClosedError, DeadlineError, ServerUnavailableError
from tenuto_proto.v1 import policy_pb2 as pb

Reply = Future[pb.StepBatchResponse]


def stream_ended() -> ServerUnavailableError:
    """Return the error of a request that a stream did not answer before it ended."""
    return ServerUnavailableError("the stream ended before its answer", code=grpc.StatusCode.UNAVAILABLE)


def stream_silent(timeout_s: float) -> DeadlineError:
    """Return the error of a request that a stream did not answer in time."""
    return DeadlineError(f"no answer on the stream within {timeout_s:.3g} s", code=grpc.StatusCode.DEADLINE_EXCEEDED)


class StepStream:
    """Hands out one connection after another. Safe to use from several threads."""

    def __init__(self, method: Callable[[Iterator[pb.StepBatchRequest]], Any]) -> None:
        """Open nothing yet. ``method``: the stub's StepStream."""
        self._method = method
        self._lock = threading.Lock()
        self._connection: _Connection | None = None
        self._closed = False

    def send(self, request: pb.StepBatchRequest, timeout_s: float) -> Exchange:
        """Send a request, whose request_id this overwrites. Does not wait for the answer."""
        with self._lock:
            if self._closed:
                raise ClientClosedError("the policy was closed")
            if self._connection is None or self._connection.is_broken:
                self._connection = _Connection(self._method)
            return Exchange(self._connection, request, timeout_s)

    def close(self) -> None:
        """End the connection; waiters get an error."""
        with self._lock:
            self._closed = True
            if self._connection is not None:
                self._connection.drop()


class Exchange:
    """One request under way, and its answer."""

    def __init__(self, connection: _Connection, request: pb.StepBatchRequest, timeout_s: float) -> None:
        self._connection, self._timeout_s, self._end = connection, timeout_s, time.monotonic() + timeout_s
        self._request_id, self._reply = connection.send(request)

    def result(self) -> pb.StepBatchResponse:
        """Wait for the answer. Raises grpc.RpcError or TenutoError; drops the connection where the time is up."""
        try:
            return self._reply.result(max(self._end - time.monotonic(), 0.0))
        except FutureTimeoutError:
            self._connection.drop()
            raise stream_silent(self._timeout_s) from None
        finally:
            self._connection.forget(self._request_id)


class _Connection:
    """One stream with the thread that reads it. Answers every waiter, whatever happens."""

    def __init__(self, method: Callable[[Iterator[pb.StepBatchRequest]], Any]) -> None:
        self._lock = threading.Lock()
        self._outbox: SimpleQueue[pb.StepBatchRequest | None] = SimpleQueue()
        self._waiters: dict[int, Reply] = {}
        self._last_id = 0
        self.is_broken = False
        self._error: Exception = stream_ended()
        """Why there are no more answers, where it is broken."""
        self._call = method(iter(self._outbox.get, None))
        threading.Thread(target=self._read, name="tenuto-stream", daemon=True).start()

    def send(self, request: pb.StepBatchRequest) -> tuple[int, Reply]:
        """Queue a request; return its id and the future of its answer."""
        reply: Reply = Future()
        with self._lock:
            self._last_id += 1
            request.request_id = self._last_id
            if self.is_broken:
                reply.set_exception(self._error)
            else:
                self._waiters[self._last_id] = reply
                self._outbox.put(request)
            return self._last_id, reply

    def forget(self, request_id: int) -> None:
        """Drop a waiter; its answer, should it still come, is ignored."""
        with self._lock:
            self._waiters.pop(request_id, None)

    def drop(self) -> None:
        """Cancel the stream; the reader then answers the waiters."""
        with self._lock:
            self.is_broken = True
        self._call.cancel()

    def _read(self) -> None:
        try:
            for response in self._call:
                with self._lock:
                    reply = self._waiters.pop(response.request_id, None)
                if reply is not None:
                    reply.set_result(response)
        except grpc.RpcError as rpc_error:
            self._error = rpc_error
        finally:
            with self._lock:
                self.is_broken = True
                waiters, self._waiters = list(self._waiters.values()), {}
            # Ends the thread in which gRPC iterates over the outbox.
            self._outbox.put(None)
            for reply in waiters:
                reply.set_exception(self._error)
