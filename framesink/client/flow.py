"""What flows through a session: room for chunks on the way in, events on the way out, both bounded.

A chunk takes a place until its reply was read. So neither requests nor events pile up: who does not
read cannot push.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from framesink.runtime.errors import BacklogError, SessionClosedError
from framesink.runtime.events import Event

_Waiter = tuple[asyncio.AbstractEventLoop, "asyncio.Future[None]"]


class Flow:
    """Places for chunks, and events. Safe from any thread and any event loop."""

    def __init__(self, places: int, max_events: int) -> None:
        """`places` chunks may be under way at once; at most `max_events` events wait."""
        self._places = places
        self._max_events = max_events
        self._taken = 0
        self._events: deque[tuple[Event, bool]] = deque()
        self._ended = self._for_good = self._paused = False
        self._failure: Exception | None = None
        self._changed = threading.Condition()
        self._waiters: list[_Waiter] = []

    @property
    def ended(self) -> bool:
        """Whether no more events will come; there may be some to read still."""
        with self._changed:
            return self._ended

    @property
    def paused(self) -> bool:
        """Whether nothing can be sent now."""
        with self._changed:
            return self._paused

    def require_open(self) -> None:
        """After the end, raise what went wrong, or else SessionClosedError."""
        with self._changed:
            if self._ended:
                raise self._failure or SessionClosedError(
                    "The session is over and takes no more input; open another."
                )

    # Places.

    def take_place(self) -> bool:
        """Take a place if there is one. After the end, raises as `require_open`."""
        with self._changed:
            self.require_open()
            if self._paused or self._taken >= self._places:
                return False
            self._taken += 1
            return True

    def return_places(self, count: int) -> None:
        """Return places of chunks that no event will be read of."""
        with self._changed:
            self._taken -= count
            self._notify()

    def pause(self) -> None:
        """Give no places until `resume`."""
        with self._changed:
            self._paused = True

    def resume(self) -> None:
        """Give places again."""
        with self._changed:
            self._paused = False
            self._notify()

    # Events.

    def put(self, event: Event, *, returns_place: bool = False) -> None:
        """Add an event, waiting while too many wait to be read; after the end it is dropped.

        With `returns_place` its reader returns the chunk's place.
        """
        with self._changed:
            self._changed.wait_for(lambda: len(self._events) < self._max_events or self._ended)
            if self._ended:
                self._taken -= returns_place
            else:
                self._events.append((event, returns_place))
            self._notify()

    def poll(self) -> Event | None:
        """The next event, if there is one. At the end, raises what went wrong, or else EOFError."""
        with self._changed:
            if not self._events:
                if self._ended:
                    raise self._failure or EOFError
                return None
            event, returns_place = self._events.popleft()
            self._taken -= returns_place
            self._notify()
            return event

    def end(self, failure: Exception | None = None, *, for_good: bool = False) -> None:
        """No more events come. What waits can still be read; then `failure` is raised.

        After an end `for_good` nothing opens it again.
        """
        with self._changed:
            self._for_good |= for_good
            if not self._ended:
                self._ended, self._failure = True, failure
            self._notify()

    def reopen(self) -> None:
        """Take events again."""
        with self._changed:
            if not self._for_good:
                self._ended, self._failure = False, None

    # Waiting.

    def wait(self, ready: Callable[[], bool], timeout: float) -> bool:
        """Wait until `ready`, which is asked at every change; whether it is."""
        with self._changed:
            return self._changed.wait_for(ready, timeout)

    async def wait_async(self, ready: Callable[[], bool], timeout: float) -> bool:
        """As `wait`, without blocking the event loop."""
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + timeout
        while True:
            waiter = (loop, loop.create_future())
            with self._changed:
                if ready():
                    return True
                self._waiters.append(waiter)
            try:
                await asyncio.wait_for(waiter[1], max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                return ready()
            finally:
                with self._changed, suppress(ValueError):
                    self._waiters.remove(waiter)

    def readable(self) -> bool:
        """Whether there is an event, or the end."""
        with self._changed:
            return bool(self._events) or self._ended

    def _notify(self) -> None:
        self._changed.notify_all()
        for loop, future in self._waiters:
            with suppress(RuntimeError):  # the loop was closed: nobody waits there any more
                loop.call_soon_threadsafe(_wake, future)
        self._waiters.clear()


def _wake(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def backlog(waited: float) -> BacklogError:
    """The error of a push that found no place."""
    return BacklogError(
        f"No chunk under way was answered and read within {waited:g} s; read the session's events, "
        "or push less."
    )
