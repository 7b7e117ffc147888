"""What a session said, kept by its client: the only memory that survives a crashed server."""

from framesink.runtime.events import Event, EventKind

_SAID = (EventKind.COMMENTARY, EventKind.ANSWER)


class Transcript:
    """The words of all replies, bounded: of a long session its beginning and its end.

    That is what a sink and window policy keeps of the text, too. Not safe for several threads.
    """

    def __init__(self, max_characters: int, beginning: str = "") -> None:
        """Half of `max_characters` are kept of the beginning, half of the end."""
        self._head_limit = max_characters // 2
        self._tail_limit = max_characters - self._head_limit
        self._head = self._tail = ""
        self._turn: int | None = None
        self._append(beginning)

    @property
    def text(self) -> str:
        """The words, replies parted by a space where nothing else parts them."""
        return self._head + self._tail

    def add(self, event: Event) -> None:
        """Take the words of an event."""
        if event.kind not in _SAID or not event.text:
            return
        new_reply = event.turn != self._turn
        self._turn = event.turn
        last = (self._tail or self._head)[-1:]
        parted = not last or last.isspace() or event.text[0].isspace()
        self._append(event.text if parted or not new_reply else " " + event.text)

    def _append(self, text: str) -> None:
        room = self._head_limit - len(self._head)
        self._head += text[:room]
        self._tail = (self._tail + text[room:])[-self._tail_limit :]
