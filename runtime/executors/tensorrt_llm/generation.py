"""One request to TensorRT-LLM, in a thread of its own.

`LLM.generate_async` preprocesses and hashes all video of the prompt in the calling thread, and
`async for` binds a result to a running event loop: so every request has a thread that submits it
and reads it with a plain `for`, and the engine's thread never waits.
"""

import logging
import threading
from collections.abc import Callable
from typing import Any

from framesink.runtime.executors.tensorrt_llm.contract import first_line

COMPLETE = ("stop", "length")
# What is raised for a request it does not take, besides its own RequestError.
_REFUSALS = (ValueError, TypeError, AssertionError, NotImplementedError)
_log = logging.getLogger(__name__)


class RequestGeneration:
    """See `framesink.runtime.prompting.executor.Generation`."""

    def __init__(self, submit: Callable[[], Any], notify: Callable[[], None]) -> None:
        """`submit` sends the request and returns its `RequestOutput`."""
        self._submit = submit
        self._notify = notify
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._tokens: list[int] = []
        self._taken = 0
        self._failure: str | None = None
        self._prompt_tokens: int | None = None
        self._result: Any = None
        self._cancelled = False
        # A daemon: TensorRT-LLM may never answer, and the process must end all the same.
        threading.Thread(target=self._run, name="tensorrt_llm request", daemon=True).start()

    @property
    def ended(self) -> bool:
        """See Generation."""
        return self._ended.is_set()

    @property
    def failure(self) -> str | None:
        """See Generation."""
        return self._failure

    @property
    def prompt_tokens(self) -> int | None:
        """How many tokens TensorRT-LLM made of the prompt; None before it said so."""
        return self._prompt_tokens

    def take(self) -> list[int]:
        """See Generation."""
        with self._lock:
            tokens = self._tokens[self._taken :]
            self._taken = len(self._tokens)
        return tokens

    def cancel(self) -> None:
        """See Generation: aborts the request; its thread reads on until it has ended."""
        with self._lock:
            self._cancelled = True
            result = self._result
        if result is not None and not self.ended:
            self._abort(result)

    def wait(self, seconds: float) -> bool:
        """See Generation."""
        return self._ended.wait(seconds)

    def _run(self) -> None:
        try:
            if not self._cancelled:
                self._follow(self._submit())
        except Exception as error:
            self._failure = describe_failure(error)
            _log.warning("%s", self._failure)
        finally:
            with self._lock:
                self._result = None
            self._ended.set()
            self._notify()

    def _follow(self, result: Any) -> None:
        with self._lock:
            self._result = result
            cancelled = self._cancelled
        if cancelled:
            self._abort(result)
        reason: str | None = None
        for output in result:  # the same object every time, with more in it
            if output.prompt_token_ids is not None:
                self._prompt_tokens = len(output.prompt_token_ids)
            completion = output.outputs[0]
            reason = completion.finish_reason
            self._add(completion.token_ids)
        if reason not in COMPLETE:
            self._failure = f"TensorRT-LLM ended the reply before it was complete ({reason})."

    def _add(self, token_ids: list[int]) -> None:
        with self._lock:
            # A stop token that was there may be gone at the end.
            new = list(token_ids[len(self._tokens) :])
            self._tokens += new
        if new:
            self._notify()

    @staticmethod
    def _abort(result: Any) -> None:
        try:
            result.abort()
        except Exception:
            _log.warning("TensorRT-LLM could not abort a request", exc_info=True)


def describe_failure(error: Exception) -> str:
    """What went wrong with a request, in one sentence."""
    what = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, _REFUSALS) or type(error).__name__ == "RequestError":
        return f"TensorRT-LLM refused the request ({what})."
    return f"TensorRT-LLM failed during the request ({what})."
