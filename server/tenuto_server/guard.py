"""Turns what a method raises into a gRPC status, and counts how requests end: the one place where errors leave the
server.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from tenuto_proto import WireError
from tenuto_proto.errors import STATUS_DETAILS_KEY, encode_status
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_proto.v1 import policy_pb2_grpc
from tenuto_server.errors import Refusal, SnapshotError, as_refusal
from tenuto_server.metrics import Metrics

log = logging.getLogger(__name__)
Method = Callable[[Any, Any], Awaitable[Any]]


def guarded(service: policy_pb2_grpc.PolicyServiceServicer, metrics: Metrics) -> policy_pb2_grpc.PolicyServiceServicer:
    """Wrap the methods of a service. A stream answers in band, with the same refusals; it is refused itself where it is
    nobody's.

    An interceptor would do the same, but it is awaited and makes a handler anew for every call.
    """
    wrapped = policy_pb2_grpc.PolicyServiceServicer()
    for method in pb.DESCRIPTOR.services_by_name["PolicyService"].methods:
        inner = getattr(service, method.name)
        guard = _guarded_stream if method.server_streaming else _guarded
        setattr(wrapped, method.name, guard(method.name, inner, metrics))
    return wrapped


def _guarded(rpc: str, inner: Method, metrics: Metrics) -> Method:
    async def call(request: Any, context: Any) -> Any:
        try:
            response = await inner(request, context)
            metrics.count_request(rpc, "OK")
            return response
        except asyncio.CancelledError:
            metrics.count_request(rpc, "CANCELLED")
            raise
        except (Refusal, WireError, SnapshotError) as error:
            await _refuse(rpc, as_refusal(error), context, metrics)
        except Exception:
            log.exception("%s failed", rpc)
            metrics.count_request(rpc, "INTERNAL")
            await context.abort(grpc.StatusCode.INTERNAL, "internal error")

    return call


def _guarded_stream(rpc: str, inner: Method, metrics: Metrics) -> Method:
    """Its messages count themselves. What gRPC would tell the client of an exception is the text of it."""

    async def call(request_iterator: Any, context: Any) -> None:
        try:
            await inner(request_iterator, context)
        except grpc.aio.AbortError:
            raise
        except Refusal as refusal:
            await _refuse(rpc, refusal, context, metrics)
        except Exception as error:
            if context.done() or type(error).__name__ == "ExecuteBatchError":  # The client is gone.
                raise
            log.exception("%s failed", rpc)
            metrics.count_request(rpc, "INTERNAL")
            await context.abort(grpc.StatusCode.INTERNAL, "internal error")

    return call


async def _refuse(rpc: str, refusal: Refusal, context: Any, metrics: Metrics) -> None:
    metrics.count_request(rpc, refusal.code.name)
    metrics.refusals.labels(refusal.reason_name).inc(refusal.num_rows)
    details = encode_status(refusal.code, str(refusal), refusal.reason, refusal.metadata, refusal.retry_after_s)
    await context.abort(refusal.code, str(refusal), ((STATUS_DETAILS_KEY, details),))
