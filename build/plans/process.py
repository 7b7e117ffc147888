"""Compile a part in a process of its own, and give its memory back afterwards."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable

from pydantic import ValidationError

from framesink.build.memory import PeakMemory
from framesink.build.plans.jobs import (
    EVENT_ADAPTER,
    CompiledPlan,
    CompileJob,
    Failure,
    Message,
    Progress,
)
from framesink.build.plans.messages import BuilderMessage
from framesink.runtime.errors import BuildError

_WORKER = "framesink.build.plans.worker"
_CANCEL_GRACE_SECONDS = 10.0


def compile_in_process(
    job: CompileJob,
    *,
    on_progress: Callable[[float, str], None],
    on_message: Callable[[BuilderMessage], None],
) -> tuple[CompiledPlan, int]:
    """Compile `job` in a child process and follow it; also returns its peak memory in bytes.

    Raises BuildError with the child's sentence, or with the signal that ended it. Any other
    exception while following (KeyboardInterrupt above all) cancels the child and waits for its end,
    and removes what it wrote.
    """
    # A session of its own: Ctrl-C of the terminal reaches this process alone, which then decides.
    # Isolated from the working directory (-P), whose files could take the place of packages.
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", _WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        with PeakMemory(process.pid) as memory:
            result = _follow(process, job, on_progress, on_message)
        status = process.wait()
    except BaseException:
        _cancel(process)
        job.plan.unlink(missing_ok=True)
        raise
    if isinstance(result, CompiledPlan) and status == 0:
        return result, memory.peak
    job.plan.unlink(missing_ok=True)
    if isinstance(result, Failure):
        raise BuildError(result.sentence)
    raise BuildError(f"The process compiling {job.graph.name} {_describe_end(status)}.")


def _follow(
    process: subprocess.Popen[str],
    job: CompileJob,
    on_progress: Callable[[float, str], None],
    on_message: Callable[[BuilderMessage], None],
) -> CompiledPlan | Failure | None:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # a child that died is told by its exit status
        process.stdin.write(job.model_dump_json() + "\n")
        process.stdin.flush()
    result: CompiledPlan | Failure | None = None
    for line in process.stdout:
        try:
            event = EVENT_ADAPTER.validate_json(line)
        except ValidationError:  # a library wrote to standard output by itself
            on_message(BuilderMessage("info", line.rstrip()))
            continue
        if isinstance(event, Progress):
            on_progress(event.fraction, event.phase)
        elif isinstance(event, Message):
            on_message(BuilderMessage(event.severity, event.text))
        else:
            result = event
    return result


def _cancel(process: subprocess.Popen[str]) -> None:
    """Ask the child to stop by closing its standard input; end it if it does not."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    process.stdin = None
    # A second, impatient Ctrl-C ends the waiting too.
    with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        process.communicate(timeout=_CANCEL_GRACE_SECONDS)
    if process.poll() is None:
        process.kill()
        process.wait()


def _describe_end(status: int) -> str:
    if status == -signal.SIGKILL:
        return "was killed, most likely because the machine ran out of memory"
    if status < 0:
        return f"ended by signal {signal.Signals(-status).name}"
    return f"ended with status {status} and no result"
