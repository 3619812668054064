"""The container's health check: exits 0 exactly when the server answers steps, else 1 with one line.

Asks /readyz at TENUTO_HEALTH_ADDRESS, by default the server's own metrics port, which is plain HTTP whatever the gRPC
port is.
"""

import os
import sys
import urllib.error
import urllib.request

TIMEOUT_S = 4.0

address = os.environ.get("TENUTO_HEALTH_ADDRESS", "127.0.0.1:9464")
# A proxy is for the world outside.
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
try:
    with direct.open(f"http://{address}/readyz", timeout=TIMEOUT_S):
        print("SERVING")
except urllib.error.HTTPError as error:
    with error:
        sys.exit(f"{address}: {error.read(200).decode(errors='replace').strip()}")
except OSError as error:
    sys.exit(f"{address}: {error}")
