"""Scores replies against the truth of scenes: events, answers, running counts."""

from dataclasses import dataclass

from demo import phrases
from demo.world import EventName, QuestionName, Scene


@dataclass(slots=True)
class Score:
    """Counts over all scenes scored so far.

    An event is right if the words are, whatever the ordinal says. A count is an entry's ordinal,
    asked of every entry: an entry that was missed or called something else counts as wrong.
    """

    events: int = 0
    reported: int = 0
    matched: int = 0
    entries: int = 0
    right_counts: int = 0
    later_entries: int = 0
    right_later_counts: int = 0
    questions: int = 0
    right_answers: int = 0
    questions_by_name: dict[str, list[int]] | None = None

    def add(self, scene: Scene, replies: list[str]) -> None:
        """Score the replies of a scene, one text a chunk, without the closing."""
        if self.questions_by_name is None:
            self.questions_by_name = {name.value: [0, 0] for name in QuestionName}
        for truth, reply in zip(scene.truth, replies, strict=True):
            if truth.question is not None:
                right = reply.strip() == truth.question.answer.strip()
                self.questions += 1
                self.right_answers += right
                tally = self.questions_by_name[truth.question.name.value]
                tally[0] += right
                tally[1] += 1
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
                self.entries += 1
                self.right_counts += right
                if truth.event.ordinal > 1:
                    self.later_entries += 1
                    self.right_later_counts += right

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
        return self.right_answers / max(1, self.questions)

    @property
    def count_accuracy(self) -> float:
        """Right ordinals among entries."""
        return self.right_counts / max(1, self.entries)

    @property
    def later_count_accuracy(self) -> float:
        """Right ordinals among entries that are not the first of their kind."""
        return self.right_later_counts / max(1, self.later_entries)

    def __str__(self) -> str:
        tallies = (self.questions_by_name or {}).items()
        kinds = ", ".join(f"{name} {right / max(1, n):.3f}" for name, (right, n) in tallies)
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
