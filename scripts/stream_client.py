"""Narrate a file or a webcam on a server, captions live.

python scripts/stream_client.py grpc://localhost:8001 demo/clip.mp4 --query "Say what happens."
"""

import argparse
import sys
import threading

from framesink import ChunkStream, Event, EventKind, FramesinkError, open_source
from framesink.client import Session, SessionSettings, connect
from framesink.client.frames import FRAME_FORMATS
from framesink.serving.contract import LANGUAGE_MODEL, STREAMING_VLM
from framesink.terminal.view import clock, printable

_TEXT = (EventKind.COMMENTARY, EventKind.ANSWER)


def show(event: Event, begun: bool) -> bool:
    """Print one event; whether a line was begun and not ended."""
    if event.kind not in _TEXT:
        if event.text:
            print(f"{event.kind.value}: {printable(event.text)}", file=sys.stderr)
        return begun
    if event.text and not begun:
        question = f"{printable(event.question)} → " if event.question else ""
        print(f"[{clock(event.t0, event.t1)}] {question}", end="")
        begun = True
    piece = "".join(letter if letter.isprintable() else " " for letter in event.text)
    print(piece, end="\n" if begun and event.final else "", flush=True)
    return begun and not event.final


def narrate(arguments: argparse.Namespace) -> None:
    settings = SessionSettings(
        model=STREAMING_VLM if arguments.ensemble else LANGUAGE_MODEL,
        frame_format=arguments.frame_format,
        quality=arguments.quality,
    )
    with (
        connect(arguments.url) as client,
        ChunkStream(open_source(arguments.source), realtime=not arguments.fast) as chunks,
        client.session(arguments.query, settings=settings) as session,
    ):
        feeder = threading.Thread(target=feed, args=(session, chunks, arguments.ask), daemon=True)
        feeder.start()
        begun = False
        for event in session:
            begun = show(event, begun)


def feed(session: Session, chunks: ChunkStream, question: str | None) -> None:
    try:
        for number, chunk in enumerate(chunks):
            session.push_chunk(chunk, question=question if number == 0 else None)
    except FramesinkError as error:  # the session's own end comes as an event or from iterating
        print(f"error: {error}", file=sys.stderr)
    finally:
        session.finish()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="the server, such as grpc://localhost:8001")
    parser.add_argument("source", nargs="?", default="0", help="a file, a webcam index or a URL")
    parser.add_argument("--query", help="a standing instruction")
    parser.add_argument("--ask", help="a question to ask with the first chunk")
    parser.add_argument("--fast", action="store_true", help="as fast as the server goes")
    parser.add_argument("--ensemble", action="store_true", help="go through streaming_vlm")
    parser.add_argument("--frame-format", choices=FRAME_FORMATS, default="jpeg")
    parser.add_argument("--quality", type=int, default=90, help="of JPEG, 1 to 100")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        narrate(parse())
    except FramesinkError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
