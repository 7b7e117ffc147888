"""Scores replies against the truth of scenes: events, answers, running counts."""

from dataclasses import dataclass, field

from demo import phrases
from demo.scene import EventName, QuestionName, Scene


@dataclass(slots=True)
class Tally:
    """How many of how many were right."""

    right: int = 0
    total: int = 0

    def add(self, right: bool) -> None:
        """Count one more."""
        self.right += right
        self.total += 1

    @property
    def accuracy(self) -> float:
        """Share of right ones; 0 where there were none."""
        return self.right / max(1, self.total)


@dataclass(slots=True)
class Score:
    """Counts over all scenes scored so far.

    An event is right if the words are, whatever the ordinal says. A count is an entry's ordinal,
    asked of every entry: an entry that was missed or called something else counts as wrong.
    """

    events: int = 0
    reported: int = 0
    matched: int = 0
    counts: Tally = field(default_factory=Tally)
    later_counts: Tally = field(default_factory=Tally)
    answers: dict[str, Tally] = field(
        default_factory=lambda: {name.value: Tally() for name in QuestionName}
    )

    def add(self, scene: Scene, replies: list[str]) -> None:
        """Score the replies of a scene, one text a chunk, without the closing."""
        for truth, reply in zip(scene.truth, replies, strict=True):
            if truth.question is not None:
                right = reply.strip() == truth.question.answer.strip()
                self.answers[truth.question.name.value].add(right)
                continue
            said_ordinal, said = split_ordinal(reply)
            self.reported += bool(said)
            if truth.event is None:
                continue
            ordinal, phrase = split_ordinal(truth.event.phrase)
            self.events += 1
            self.matched += said == phrase
            if truth.event.name is EventName.ENTERS:
                right = said == phrase and said_ordinal == ordinal
                self.counts.add(right)
                if truth.event.ordinal > 1:
                    self.later_counts.add(right)

    @property
    def precision(self) -> float:
        """Right among reported events."""
        return self.matched / max(1, self.reported)

    @property
    def recall(self) -> float:
        """Reported rightly among true events."""
        return self.matched / max(1, self.events)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return 2 * self.matched / max(1, self.reported + self.events)

    @property
    def answer_accuracy(self) -> float:
        """Right among answers."""
        tallies = self.answers.values()
        return sum(t.right for t in tallies) / max(1, sum(t.total for t in tallies))

    @property
    def count_accuracy(self) -> float:
        """Right ordinals among entries."""
        return self.counts.accuracy

    @property
    def later_count_accuracy(self) -> float:
        """Right ordinals among entries that are not the first of their kind."""
        return self.later_counts.accuracy

    def __str__(self) -> str:
        kinds = ", ".join(f"{name} {tally.accuracy:.3f}" for name, tally in self.answers.items())
        return (
            f"events P {self.precision:.3f} R {self.recall:.3f} F1 {self.f1:.3f} | "
            f"answers {self.answer_accuracy:.3f} ({kinds}) | counts {self.count_accuracy:.3f} "
            f"(second and later {self.later_count_accuracy:.3f})"
        )


def split_ordinal(reply: str) -> tuple[str, str]:
    """An ordinal at the start of a reply ("" if there is none), and the rest."""
    text = reply.strip()
    first, _, rest = text.partition(" ")
    return (first, rest) if first in phrases.ORDINALS else ("", text)
