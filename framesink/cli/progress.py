"""A build's stages as progress bars on standard error, or as lines where that is no terminal."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class RichReporter:
    """A `framesink.build.reporter.Reporter` for people. Used as a context manager."""

    def __init__(self, console: Console, *, verbose: bool = False) -> None:
        """`verbose` prints every message of the tools too."""
        self._console = console
        self._verbose = verbose
        self._task: TaskID | None = None
        self._progress = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description:<24}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[detail]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._finish_stage()
        self._progress.stop()

    def stage(self, name: str) -> None:
        """A stage begins; the one before it is over."""
        self._finish_stage()
        self._task = self._progress.add_task(name.capitalize(), total=1.0, detail="")
        if not self._console.is_terminal:
            self._console.print(f"{name} …", highlight=False)

    def progress(self, fraction: float, detail: str = "") -> None:
        """The running stage is this far."""
        if self._task is not None:
            # 100 % is shown when the stage is over, not before.
            self._progress.update(self._task, completed=min(fraction, 0.99), detail=detail)

    def note(self, sentence: str) -> None:
        """Something a person should know: printed above the bars."""
        self._console.print(sentence, highlight=False, markup=False, soft_wrap=True)

    def log(self, line: str) -> None:
        """A tool's message: printed with `--verbose`."""
        if self._verbose:
            self._console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)

    def _finish_stage(self) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=1.0, detail="")
