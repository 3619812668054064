"""A network between clients and servers that can be cut, slowed down and turned off. Owns a thread."""

from __future__ import annotations

import asyncio
import random
import threading
from concurrent.futures import Future
from types import TracebackType

_CHUNK = 65_536


class Proxy:
    """Forwards TCP connections of one address, each to one of ``ports`` at random. Methods may come from any thread."""

    def __init__(self, seed: int) -> None:
        self.ports: list[int] = []
        """Where servers listen on loopback just now."""
        self.delay_s = 0.0
        """For which each chunk is held back."""
        self.num_cut = 0
        """Connections that were broken so far."""
        self._random = random.Random(seed)
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._accept, "127.0.0.1", 0)).result()
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def _call(self, coroutine: object) -> Future[asyncio.Server]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)  # pyright: ignore[reportArgumentType]

    def cut(self) -> None:
        """Break every connection there is, in both directions and at once."""
        self._loop.call_soon_threadsafe(self._cut)

    def _cut(self) -> None:
        self.num_cut += len(self._writers) // 2
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            onward = await asyncio.open_connection("127.0.0.1", self._random.choice(self.ports))
        except (OSError, IndexError):
            writer.transport.abort()
            return
        self._writers |= {writer, onward[1]}
        try:
            await asyncio.gather(self._pump(reader, onward[1]), self._pump(onward[0], writer))
        finally:
            self._writers -= {writer, onward[1]}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(_CHUNK):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.transport.abort()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._cut)
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.01))
        self._loop.close()
