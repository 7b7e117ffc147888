"""Questions typed while a stream runs."""

import codecs
import os
import select
import sys
import termios
import threading
import tty
from collections.abc import Callable

_POLL_SECONDS = 0.2
_ERASE = ("\x7f", "\x08")
_ERASE_LINE = "\x15"
_ESCAPE = "\x1b"


class LineEditor:
    """Keys in, lines out: characters, erase, erase line, enter. Escape sequences are skipped."""

    def __init__(self) -> None:
        self.text = ""
        self._escape = ""

    def key(self, character: str) -> str | None:
        """Take one character; the line if it was finished and is not blank."""
        if self._escape or character == _ESCAPE:
            self._skip_escape(character)
        elif character in "\r\n":
            line, self.text = self.text.strip(), ""
            return line or None
        elif character in _ERASE:
            self.text = self.text[:-1]
        elif character == _ERASE_LINE:
            self.text = ""
        elif character.isprintable():
            self.text += character
        return None

    def _skip_escape(self, character: str) -> None:
        """A sequence is ESC and one character, or ESC [ (or O) up to a letter or tilde."""
        self._escape += character
        if len(self._escape) == 2:
            ended = character not in "[O"
        else:
            ended = len(self._escape) > 2 and (character.isalpha() or character == "~")
        if ended:
            self._escape = ""


def can_type() -> bool:
    """Whether stdin is the terminal this program is in the foreground of."""
    try:
        descriptor = sys.stdin.fileno()
        return os.isatty(descriptor) and os.tcgetpgrp(descriptor) == os.getpgrp()
    except (OSError, ValueError, AttributeError):
        return False


class Keyboard:
    """Reads the terminal without echo, in a thread; the terminal's mode is put back on `close`."""

    def __init__(self, asked: Callable[[str], None], typing: Callable[[str], None]) -> None:
        """`asked` gets every finished line, `typing` the line so far; both from the thread."""
        self._asked = asked
        self._typing = typing
        self._descriptor = sys.stdin.fileno()
        self._mode = termios.tcgetattr(self._descriptor)
        self._stopping = threading.Event()
        # Keys come one by one and unechoed; Ctrl-C remains a signal.
        tty.setcbreak(self._descriptor, termios.TCSANOW)
        self._thread = threading.Thread(target=self._read, name="keyboard", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop reading and restore the terminal; idempotent."""
        self._stopping.set()
        self._thread.join()
        termios.tcsetattr(self._descriptor, termios.TCSADRAIN, self._mode)

    def _read(self) -> None:
        editor = LineEditor()
        decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        while not self._stopping.is_set():
            try:
                if not select.select([self._descriptor], [], [], _POLL_SECONDS)[0]:
                    continue
                data = os.read(self._descriptor, 1024)
            except OSError:
                return
            if not data:
                return
            for character in decoder.decode(data):
                line = editor.key(character)
                if line is not None:
                    self._asked(line)
            self._typing(editor.text)
