"""Where a server is: host:port, or one of the other targets that gRPC understands."""

from __future__ import annotations

import re

_SCHEMES = ("unix", "unix-abstract", "vsock", "dns", "ipv4", "ipv6", "xds")
"""What gRPC resolves by itself; their targets are left to it."""
_HOST_PORT = re.compile(r"(?:\[[0-9A-Fa-f:.%\w]+\]|[^\s:/@\[\]]+):(?P<port>[0-9]{1,5})")


def check_address(address: str, name: str = "address") -> str:
    """Return the address. Raises ValueError, which calls it ``name``, where nobody can be there."""
    # Checked at run time: gRPC itself takes anything and fails much later.
    if isinstance(address, str):
        scheme, _, target = address.partition(":")
        if scheme in _SCHEMES and target.strip("/"):
            return address
        match = _HOST_PORT.fullmatch(address)
        if match is not None and 1 <= int(match["port"]) <= 65535:
            return address
    raise ValueError(f"{name}: got {address!r}, expected host:port")
