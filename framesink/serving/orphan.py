"""A model process whose server was killed does not end by itself."""

import os
import threading
import time

_WATCH_SECONDS = 1.0
_EXIT_STATUS = 71


def end_with_parent() -> None:
    """End this process, from now on, within a second or two of its parent's end."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(_EXIT_STATUS)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()
