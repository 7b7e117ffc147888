"""How replies are scored."""

from demo.metrics import Score
from demo.scene import ChunkTruth, EventName, Scene, SceneEvent, SceneQuestion
from demo.scene import QuestionName as Ask

ENTRY = SceneEvent(EventName.ENTERS, "red", "circle", ordinal=2)
LEAVING = SceneEvent(EventName.LEAVES, "red", "circle")
QUESTION = SceneQuestion(Ask.HOW_MANY, "How many shapes are there?", " two shapes.")
TRUTH = (
    ChunkTruth(event=ENTRY),
    ChunkTruth(),
    ChunkTruth(event=LEAVING),
    ChunkTruth(question=QUESTION),
)
SCENE = Scene(seed=0, seconds=4, sprites=(), truth=TRUTH)


def score(*replies: str) -> Score:
    result = Score()
    result.add(SCENE, list(replies))
    return result


def test_right_replies_score_one() -> None:
    result = score(*(truth.reply for truth in TRUTH))
    assert (result.precision, result.recall, result.f1) == (1.0, 1.0, 1.0)
    assert result.count_accuracy == result.later_count_accuracy == result.answer_accuracy == 1.0


def test_a_wrong_ordinal_is_a_right_event_and_a_wrong_count() -> None:
    result = score(" third red circle enters.", "", " red circle leaves.", " two shapes.")
    assert result.f1 == 1.0
    assert result.count_accuracy == 0.0


def test_an_invention_costs_precision_and_a_miss_recall() -> None:
    result = score(" second red circle enters.", " red star leaves.", "", " one shape.")
    assert (result.precision, result.recall) == (0.5, 0.5)
    assert result.count_accuracy == 1.0
    assert result.answer_accuracy == 0.0


def test_an_entry_called_something_else_is_a_wrong_count() -> None:
    result = score(" second red star enters.", "", " red circle leaves.", " two shapes.")
    assert result.count_accuracy == 0.0
