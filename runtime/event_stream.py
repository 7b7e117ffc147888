"""A session's way out: events from the engine's thread to threads and coroutines."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from framesink.runtime.events import Event


class EventStream:
    """An unbounded queue of events with an end. Safe from any thread and any event loop."""

    def __init__(
        self,
        *,
        replied: Callable[[Event], None] | None = None,
        ended: Callable[[], None] | None = None,
    ) -> None:
        """`replied` is told every final event, `ended` the end, once, in the thread it comes in."""
        self._replied = replied
        self._tell_end = ended
        self._events: deque[Event] = deque()
        self._ended = False
        self._changed = threading.Condition()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    @property
    def ended(self) -> bool:
        """Whether all events have been taken and no more will come."""
        with self._changed:
            return self._ended and not self._events

    def put(self, event: Event) -> None:
        """Add an event; after the end it is dropped."""
        with self._changed:
            if self._ended:
                return
            self._events.append(event)
            self._notify()
        if event.final and self._replied is not None:
            self._replied(event)

    def end(self) -> None:
        """No more events will come; those in the queue can still be taken."""
        with self._changed:
            first, self._ended = not self._ended, True
            self._notify()
        if first and self._tell_end is not None:
            self._tell_end()

    def poll(self) -> Event | None:
        """The next event, if there is one."""
        with self._changed:
            return self._events.popleft() if self._events else None

    def wait(self) -> None:
        """Block until there is an event or the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._events or self._ended)

    async def wait_async(self) -> None:
        """Wait for an event or the end without blocking the event loop."""
        loop = asyncio.get_running_loop()
        waiter = (loop, loop.create_future())
        with self._changed:
            if self._events or self._ended:
                return
            self._waiters.append(waiter)
        try:
            await waiter[1]
        finally:
            with self._changed:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)

    def _notify(self) -> None:
        self._changed.notify_all()
        for loop, future in self._waiters:
            with suppress(RuntimeError):  # the loop was closed: nobody waits there any more
                loop.call_soon_threadsafe(_wake, future)
        self._waiters.clear()


def _wake(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
