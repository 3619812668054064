"""A TCP link between a client and a server that a test can cut, and on which it can lose either direction first."""

from __future__ import annotations

import contextlib
import socket
import threading


class Link:
    """Forwards connections made to ``address``. Bytes of a lost direction vanish until the link is cut."""

    def __init__(self, target: str) -> None:
        host, port = target.rsplit(":", 1)
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._ends: list[socket.socket] = []
        self._lock = threading.Lock()
        self._loses_requests, self._loses_replies = threading.Event(), threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def lose_requests(self) -> None:
        """From now on nothing reaches the server."""
        self._loses_requests.set()

    def lose_replies(self) -> None:
        """From now on nothing comes back."""
        self._loses_replies.set()

    def cut(self) -> None:
        """End all connections; those that are made from now on work."""
        with self._lock:
            ends, self._ends = self._ends, []
            self._loses_requests, self._loses_replies = threading.Event(), threading.Event()
        for end in ends:
            # Wakes the threads that forward, which close alone does not.
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
            except OSError:
                return
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._ends += [client, server]
                ways = ((client, server, self._loses_requests), (server, client, self._loses_replies))
            for way in ways:
                threading.Thread(target=self._forward, args=way, daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, is_lost: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if not is_lost.is_set():
                    sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self.cut()
