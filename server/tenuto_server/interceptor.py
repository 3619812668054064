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
from tenuto_server.errors import Refusal
from tenuto_server.metrics import Metrics

log = logging.getLogger(__name__)


def as_refusal(error: Refusal | WireError) -> Refusal:
    """Turn an error of the contract into one of the server's."""
    return error if isinstance(error, Refusal) else Refusal(error.reason, str(error))


class RefusalInterceptor(grpc.aio.ServerInterceptor):
    """For the unary methods of one service; a stream answers in band, with the same refusals."""

    def __init__(self, service: str, metrics: Metrics) -> None:
        self._prefix, self._metrics = f"/{service}/", metrics

    async def intercept_service(self, continuation: Callable[..., Awaitable[Any]], handler_call_details: Any) -> Any:
        """Wrap a unary method."""
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or handler.unary_unary is None or not method.startswith(self._prefix):
            return handler
        inner, rpc = handler.unary_unary, method.removeprefix(self._prefix)

        async def guarded(request: Any, context: Any) -> Any:
            try:
                response = await inner(request, context)
                self._metrics.count_request(rpc, "OK")
                return response
            except asyncio.CancelledError:
                self._metrics.count_request(rpc, "CANCELLED")
                raise
            except (Refusal, WireError) as error:
                refusal = as_refusal(error)
                self._metrics.count_request(rpc, refusal.code.name)
                self._metrics.refusals.labels(refusal.reason_name).inc(refusal.num_rows)
                details = encode_status(refusal.code, str(refusal), refusal.reason, refusal.metadata)
                await context.abort(refusal.code, str(refusal), ((STATUS_DETAILS_KEY, details),))
            except Exception:
                log.exception("%s failed", method)
                self._metrics.count_request(rpc, "INTERNAL")
                await context.abort(grpc.StatusCode.INTERNAL, "internal error")

        return grpc.unary_unary_rpc_method_handler(
            guarded,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
