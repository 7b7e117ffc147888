"""Client and session for asyncio: waiting never blocks the event loop."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Self, Unpack

from framesink.client.client import Client, SessionParameters, connect
from framesink.client.connection import Tls
from framesink.client.flow import backlog
from framesink.client.frames import OutgoingChunk
from framesink.client.link import SessionLink
from framesink.client.settings import SessionSettings
from framesink.runtime.arrays import UInt8Array
from framesink.runtime.events import Event
from framesink.runtime.video.chunk import Chunk


class AsyncSession:
    """As `Session`, with coroutines; `async for` yields the events."""

    def __init__(self, link: SessionLink) -> None:
        """Made by `AsyncClient.session`."""
        self._link = link

    @property
    def sequence_id(self) -> int:
        """Triton's correlation id; another one after the server lost the session."""
        return self._link.sequence_id

    @property
    def transcript(self) -> str:
        """What was said so far: of a long session its beginning and its end."""
        return self._link.transcript

    async def push(
        self,
        frames: UInt8Array | Sequence[UInt8Array],
        timestamps: Sequence[float] | None = None,
        *,
        t0: float | None = None,
        t1: float | None = None,
        question: str | None = None,
        timeout: float | None = None,
    ) -> None:
        """See `Session.push`; frames are compressed in a thread."""
        await self._push(OutgoingChunk.of_frames(frames, timestamps, t0, t1), question, timeout)

    async def push_chunk(
        self, chunk: Chunk, *, question: str | None = None, timeout: float | None = None
    ) -> None:
        """See `Session.push`."""
        await self._push(OutgoingChunk.of_chunk(chunk), question, timeout)

    async def ask(self, text: str) -> None:
        """See `Session.ask`."""
        self._link.send_question(text)

    async def finish(self) -> None:
        """See `Session.finish`."""
        self._link.send_finish()

    async def cancel(self) -> None:
        """See `Session.cancel`."""
        await asyncio.to_thread(self._link.cancel)

    async def resume(self) -> None:
        """See `Session.resume`."""
        await asyncio.to_thread(self._link.resume)

    async def close(self) -> None:
        """See `Session.close`."""
        await asyncio.to_thread(self._link.close)

    async def __aiter__(self) -> AsyncIterator[Event]:
        link = self._link
        while True:
            try:
                event = link.flow.poll()
            except EOFError:
                return
            if event is not None:
                yield event
            elif not await link.flow.wait_async(link.flow.readable, link.settings.quiet_seconds):
                await asyncio.to_thread(link.check_server)

    async def _push(
        self, chunk: OutgoingChunk, question: str | None, timeout: float | None
    ) -> None:
        link = self._link
        limit = link.settings.push_timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        left = limit
        quiet = link.settings.quiet_seconds
        while not await link.flow.wait_async(link.flow.take_place, min(left, quiet)):
            left = deadline - time.monotonic()
            if left <= 0:
                raise backlog(limit)
            await asyncio.to_thread(link.check_server)
        await asyncio.to_thread(link.send_chunk, chunk, question)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


class AsyncClient:
    """As `Client`, with coroutines. Made by `connect_async`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def ready(self) -> bool:
        """See `Client.ready`."""
        return await asyncio.to_thread(self._client.ready)

    async def session(
        self,
        query: str | None = None,
        *,
        settings: SessionSettings | None = None,
        **parameters: Unpack[SessionParameters],
    ) -> AsyncSession:
        """See `Client.session`."""
        return AsyncSession(
            await asyncio.to_thread(self._client.open_link, query, settings, parameters)
        )

    async def close(self) -> None:
        """See `Client.close`."""
        await asyncio.to_thread(self._client.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


async def connect_async(url: str, *, timeout: float = 10.0, tls: Tls | None = None) -> AsyncClient:
    """See `connect`."""
    return AsyncClient(await asyncio.to_thread(connect, url, timeout=timeout, tls=tls))
