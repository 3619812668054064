"""The container's health check: exits 0 exactly when the server answers steps, else 1 with one line.

Asks the gRPC health service at TENUTO_HEALTH_ADDRESS, by default the server's own port.
"""

import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_S = 4.0

address = os.environ.get("TENUTO_HEALTH_ADDRESS", "127.0.0.1:50051")
# A proxy is for the world outside.
with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
    try:
        reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        sys.exit(f"{address}: {error.code().name} {error.details()}")
if reply.status != health_pb2.HealthCheckResponse.SERVING:
    sys.exit(f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)}")
print("SERVING")
