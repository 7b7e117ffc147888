"""The declared ladder: what a live stream does without, rung by rung, when it cannot keep up."""

from dataclasses import dataclass, replace
from typing import Literal

from framesink.runtime.errors import OptionError

Admission = Literal["check", "none"]
ADMISSIONS: tuple[Admission, ...] = ("check", "none")


@dataclass(frozen=True, slots=True)
class Rung:
    """What is left of a stream: the share of its `frames`, of each frame's `pixels`, and of the
    longest `reply`, each above 0 and at most 1.

    Frames are left out evenly. A frame never becomes smaller than the model's smallest.
    """

    frames: float = 1.0
    pixels: float = 1.0
    reply: float = 1.0

    def __post_init__(self) -> None:
        if not all(0 < share <= 1 for share in self.shares):
            raise OptionError(f"The shares of {self} must be above 0 and at most 1.")

    @property
    def shares(self) -> tuple[float, float, float]:
        """Of frames, of pixels, of the reply."""
        return (self.frames, self.pixels, self.reply)


FULL = Rung()
MOST_RUNGS = 12


@dataclass(frozen=True, slots=True)
class Ladder:
    """The rungs of a stream, from the first it steps down to, and when it steps.

    A reply is late if its lag is above `late` chunk lengths, early if below `early` of them. After
    `down_after` seconds of late replies the stream steps down, after `up_after` seconds of early
    ones up again, if the load that is predicted then lets it. A step that would save nothing, such
    as fewer frames where the vision encoder takes two at a time and there are two, is passed over.
    Raises OptionError for times and rungs that make no sense.
    """

    rungs: tuple[Rung, ...] = (
        Rung(frames=0.5),
        Rung(frames=0.5, pixels=0.5),
        Rung(frames=0.5, pixels=0.5, reply=0.5),
    )
    late: float = 1.0
    early: float = 0.6
    down_after: float = 3.0
    up_after: float = 10.0

    def __post_init__(self) -> None:
        if not (0 < self.early < self.late and self.down_after > 0 and self.up_after > 0):
            raise OptionError(
                f"A ladder needs 0 < early < late and times above 0, not early={self.early:g}, "
                f"late={self.late:g}, down_after={self.down_after:g}, up_after={self.up_after:g}."
            )
        if len(self.rungs) > MOST_RUNGS:
            raise OptionError(f"A ladder has at most {MOST_RUNGS} rungs, not {len(self.rungs)}.")
        for above, below in zip((FULL, *self.rungs), self.rungs, strict=False):
            shares = zip(above.shares, below.shares, strict=True)
            if above == below or any(lower > higher for higher, lower in shares):
                raise OptionError(f"Each rung must leave less than the one above it: {below}.")

    def rung(self, number: int) -> Rung:
        """A rung by its number; 0 is full quality."""
        return FULL if number == 0 else self.rungs[number - 1]

    @classmethod
    def parse(cls, text: str) -> "Ladder | None":
        """From what is halved, rung by rung, such as `frames,resolution,replies`; None from `none`.

        Raises OptionError for anything else.
        """
        names = [name.strip() for name in text.split(",", MOST_RUNGS)]
        if names == ["none"]:
            return None
        rungs: list[Rung] = []
        rung = FULL
        for name in names:
            match name:
                case "frames":
                    rung = replace(rung, frames=rung.frames / 2)
                case "resolution":
                    rung = replace(rung, pixels=rung.pixels / 2)
                case "replies":
                    rung = replace(rung, reply=rung.reply / 2)
                case _:
                    raise OptionError(
                        f"A ladder has no rung {name[:64]!r}; write what is halved, rung by rung, "
                        "as frames,resolution,replies in any order, or none."
                    )
            rungs.append(rung)
        return cls(rungs=tuple(rungs))


DEFAULT_LADDER = "frames,resolution,replies"


@dataclass(frozen=True, slots=True)
class RealTime:
    """What holds for a session whose chunks come as they happen.

    With `admission` "check" it is opened only if this machine has time for it beside the live
    streams that are open; it waits for that up to `wait` seconds, after those who came before it
    (None: not at all). When its replies are late it goes down `ladder`; None degrades nothing.
    """

    admission: Admission = "check"
    wait: float | None = None
    ladder: Ladder | None = Ladder()

    def __post_init__(self) -> None:
        if self.admission not in ADMISSIONS:
            raise OptionError(f"admission={self.admission!r} must be one of check, none.")
        if self.wait is not None and not self.wait >= 0:
            raise OptionError(f"wait={self.wait:g} must be at least 0 seconds.")
