from __future__ import annotations

import pytest

from exgrpo_fast.core.types import Question
from exgrpo_fast.experience.question_stream import QuestionStream


def questions(count: int) -> list[Question]:
    return [Question(str(i), (1, 2), "p", "a") for i in range(count)]


def ids(drawn: list[Question]) -> list[str]:
    return [question.id for question in drawn]


def test_an_epoch_shows_every_question_once() -> None:
    stream = QuestionStream(questions(10), seed=0)
    drawn = ids(stream.draw(4)) + ids(stream.draw(6))
    assert sorted(drawn, key=int) == [str(i) for i in range(10)]


def test_epochs_differ_and_repeat_with_the_seed() -> None:
    def two_epochs(seed: int) -> list[str]:
        stream = QuestionStream(questions(10), seed=seed)
        return ids(stream.draw(10)) + ids(stream.draw(10))

    assert two_epochs(0) == two_epochs(0) != two_epochs(1)
    assert two_epochs(0)[:10] != two_epochs(0)[10:]


def test_a_draw_over_the_end_of_an_epoch_has_no_duplicates() -> None:
    stream = QuestionStream(questions(5), seed=0)
    for _ in range(20):
        assert len(set(ids(stream.draw(4)))) == 4


def test_a_question_held_back_over_the_end_of_an_epoch_waits_once() -> None:
    for seed in range(20):
        stream = QuestionStream(questions(6), seed=seed)
        stream.draw(4)
        stream.draw(4, exclude={"0", "1"})
        on_poll = stream.state_dict()["waiting"]
        assert len(on_poll) == len(set(on_poll))


def test_excluded_questions_come_later() -> None:
    stream = QuestionStream(questions(6), seed=0)
    first = ids(stream.draw(3, exclude={"0", "1"}))
    rest = ids(stream.draw(3))
    assert not {"0", "1"} & set(first) and {"0", "1"} <= set(rest)


def test_retired_questions_never_come_back_down_to_the_floor() -> None:
    stream = QuestionStream(questions(6), seed=0, min_live=3)
    stream.retire(["0", "1", "2", "3", "4"])
    assert stream.num_live == 3
    assert sorted(ids(stream.draw(6))) == ["3", "4", "5"]  # fewer than asked: there are no more


def test_a_replayed_question_that_has_retired_from_the_stream_counts_once() -> None:
    stream = QuestionStream(questions(4), seed=0)
    stream.retire(["0"])
    assert sorted(ids(stream.draw(4, exclude={"0", "1"}))) == ["2", "3"]


def test_state_continues_in_the_middle_of_an_epoch() -> None:
    stream = QuestionStream(questions(20), seed=3)
    stream.draw(7, exclude={"4"})
    stream.retire(["9"])
    other = QuestionStream(questions(20), seed=3)
    other.load_state_dict(stream.state_dict())
    for _ in range(5):
        assert ids(stream.draw(6)) == ids(other.draw(6))


def test_a_checkpoint_of_other_data_is_refused() -> None:
    state = QuestionStream(questions(20), seed=0).state_dict() | {"waiting": ["19"]}
    with pytest.raises(ValueError, match="no longer has, such as 19"):
        QuestionStream(questions(5), seed=0).load_state_dict(state)
