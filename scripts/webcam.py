"""Narrate a webcam, a file or a URL: python scripts/webcam.py BUNDLE [SOURCE]"""

import sys
import threading

from framesink import (
    ChunkStream,
    FramesinkError,
    RealTime,
    Session,
    StreamingEngine,
    open_source,
)


def show(session: Session) -> None:
    for event in session:
        print(event.text, end="\n" if event.final and event.tokens else "", flush=True)


def narrate(bundle: str, source: str = "0") -> None:
    with (
        ChunkStream(open_source(source)) as chunks,
        StreamingEngine.load(bundle) as engine,
        engine.open_session(query="Say what happens.", real_time=RealTime()) as session,
    ):
        printer = threading.Thread(target=show, args=(session,))
        printer.start()
        try:
            for chunk in chunks:
                session.push_chunk(chunk)
        finally:
            session.finish()
            printer.join()


if __name__ == "__main__":
    try:
        narrate(*sys.argv[1:3])
    except FramesinkError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
