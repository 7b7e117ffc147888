"""The compiling process: `python -m framesink.build.plans.worker`.

Reads one CompileJob as a line of JSON from standard input and writes events as lines of JSON.
Standard input stays open while the work is wanted; its end cancels.
"""

import sys
import threading
import time
from typing import TextIO

from framesink.build.plans.compile import compile_plan
from framesink.build.plans.jobs import CompileJob, Failure, Message, Progress, WorkerEvent
from framesink.build.plans.messages import BuilderMessage
from framesink.runtime.errors import FramesinkError

_PROGRESS_INTERVAL_SECONDS = 0.1  # the builder reports thousands of steps a second


def run(source: TextIO, sink: TextIO) -> int:
    """Do the job read from `source`, write its events to `sink`, return the exit status."""
    lock = threading.Lock()
    job = CompileJob.model_validate_json(source.readline())
    unwanted = threading.Event()

    def watch() -> None:
        source.read()
        unwanted.set()

    def send(event: WorkerEvent) -> None:
        with lock:
            sink.write(event.model_dump_json() + "\n")
            sink.flush()

    def send_message(message: BuilderMessage) -> None:
        send(Message(severity=message.severity, text=message.text))

    last_progress = 0.0

    def send_progress(fraction: float, phase: str) -> None:
        nonlocal last_progress
        now = time.monotonic()
        if now - last_progress >= _PROGRESS_INTERVAL_SECONDS:
            last_progress = now
            send(Progress(fraction=fraction, phase=phase))

    threading.Thread(target=watch, daemon=True).start()
    try:
        plan = compile_plan(
            job, on_progress=send_progress, on_message=send_message, cancelled=unwanted.is_set
        )
    except FramesinkError as error:
        send(Failure(sentence=str(error)))
        return error.exit_code
    send(plan)
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.stdin, sys.stdout))
