"""Turns what a method raises into a gRPC status: the one place where errors leave the server."""

from __future__ import annotations

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
    """For unary methods; a stream answers in band, with the same refusals."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def intercept_service(self, continuation: Callable[..., Awaitable[Any]], handler_call_details: Any) -> Any:
        """Wrap a unary method."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return handler
        inner = handler.unary_unary

        async def guarded(request: Any, context: Any) -> Any:
            try:
                return await inner(request, context)
            except (Refusal, WireError) as error:
                refusal = as_refusal(error)
                self._metrics.refusals.labels(refusal.reason_name).inc()
                details = encode_status(refusal.code, str(refusal), refusal.reason, refusal.metadata)
                await context.abort(refusal.code, str(refusal), ((STATUS_DETAILS_KEY, details),))
            except grpc.aio.AbortError:
                raise
            except Exception:
                log.exception("%s failed", handler_call_details.method)
                await context.abort(grpc.StatusCode.INTERNAL, "internal error")

        return grpc.unary_unary_rpc_method_handler(
            guarded,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
