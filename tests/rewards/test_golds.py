"""Gold answers: the unusable ones are found before training, and public benchmarks have few."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from exgrpo_fast.core.types import Verdict
from exgrpo_fast.data import CheckedRow, check_data
from exgrpo_fast.rewards import RewardPool, RewardSample, check_golds

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("EXGRPO_SHARED", ROOT.parent / "shared")) / "data"

# (rows, line of each gold answer that math-verify 0.9.0 cannot read, with the reason)
BENCHMARKS: dict[str, tuple[int, dict[int, str]]] = {
    "aime24": (30, {}),
    "aime25": (30, {}),
    "amc": (83, {}),
    "math500": (500, {}),
    "minerva": (272, {}),
    "olympiad_bench": (
        675,
        {
            74: "unparsable",  # f(x)=ax+b, "where b is an arbitrary integer, and a is ..."
            97: "unparsable",  # t(0,4]: the letter is a slip in the data
        },
    ),
}


@pytest.fixture(scope="module")
def pool():
    with RewardPool(["math_verify"], workers=2) as made:
        made.check()
        yield made


def rows(name: str, prompt_field: str) -> list[CheckedRow]:
    path = SHARED / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"{name} is not here; EXGRPO_SHARED names the folder above data/")
    report = check_data(path, prompt_field=prompt_field)
    assert report.bad_rows == []
    return report.rows


def gold(answer: str) -> CheckedRow:
    return CheckedRow("file:1", answer, "q", answer)


def test_unusable_golds_are_listed_with_their_reason(pool) -> None:
    answers = [
        "72",
        "\\frac{1}{2",
        "\\frac{1}{2}",
        "}{",
        "(1, 2",
        "\\text{Evelyn}",
        "\\mho(",
        "1,2",
    ]
    bad = check_golds([gold(answer) for answer in answers], pool)
    assert [(g.index, g.question_id, g.reason) for g in bad] == [
        (1, "\\frac{1}{2", "unbalanced"),
        (3, "}{", "unbalanced"),
        (4, "(1, 2", "unparsable"),
        (6, "\\mho(", "unparsable"),
    ]


@pytest.mark.parametrize("answer", ["62.5%", "$8 \\%$", "0.00001%", "\\infty", "-\\infty", "2i"])
def test_a_number_without_a_plain_value_equals_itself(pool, answer: str) -> None:
    assert check_golds([gold(answer)], pool) == []


def test_an_answer_that_took_too_long_is_tried_again() -> None:
    class BusyMachine:
        """Times out for the first `late[answer]` times."""

        def __init__(self, **late: int) -> None:
            self.late, self.batches = late, []

        def score(self, samples, **options) -> list[Verdict]:
            self.batches.append([sample.answer for sample in samples])
            return [self.judge(sample.answer) for sample in samples]

        def judge(self, answer: str) -> Verdict:
            self.late[answer] -= 1
            return Verdict(0.0, "timeout") if self.late[answer] >= 0 else Verdict(1.0, "ok")

    pool: Any = BusyMachine(a=0, b=3, c=99)
    bad = check_golds([gold("a"), gold("b"), gold("c")], pool)
    assert [(g.index, g.reason) for g in bad] == [(2, "timeout")]
    assert pool.batches == [["a", "b", "c"], ["b"], ["c"], ["b"], ["c"], ["b"], ["c"]]


def test_golds_of_a_reward_that_does_not_judge_answers_are_not_held_against_it(tmp_path) -> None:
    (tmp_path / "own.py").write_text("def short(completions, **columns):\n    return [0.0]\n")
    with RewardPool([f"{tmp_path}/own.py:short"], workers=1) as own:
        assert check_golds([gold("\\frac{1}{2")], own) == []
    with RewardPool([f"{tmp_path}/own.py:short", "gsm8k"], workers=1) as both:
        assert [g.reason for g in check_golds([gold("x"), gold("1,234")], both)] == ["not_a_number"]


@pytest.mark.parametrize("name", ["chain_sum", "arc_agi", "graph_color", "countdown"])
def test_golds_of_reasoning_gym_score_themselves(name: str) -> None:
    pytest.importorskip("reasoning_gym")
    task = check_data({"gym": name, "size": 3, "seed": 5}).rows
    with RewardPool(["reasoning_gym"], workers=1) as gym:
        assert check_golds(task, gym) == []
        samples = [
            RewardSample("", f"<answer>{r.answer}</answer>", r.answer, r.columns) for r in task
        ]
        if name != "graph_color":  # it names no answer of its own
            assert [s.reward for s in gym.score(samples)] == [1.0] * 3


def test_a_sample_of_gsm8k_verifies_against_itself(pool) -> None:
    sample = rows("gsm8k/train", "question")[::25]
    assert len(sample) == 299
    assert check_golds(sample, pool) == []


@pytest.mark.parametrize(("name", "count"), [("gsm8k/train", 7473), ("gsm8k/test", 1319)])
def test_every_gold_of_gsm8k_verifies_against_itself(pool, name: str, count: int) -> None:
    every = rows(name, "question")
    assert len(every) == count
    assert check_golds(every, pool) == []
    boxed = [RewardSample("", f"so \\boxed{{{row.answer}}}", row.answer) for row in every]
    assert {scored.reward for scored in pool.score(boxed)} == {1.0}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_golds_verify_or_are_listed_here(pool, name: str) -> None:
    count, unusable = BENCHMARKS[name]
    every = rows(f"math_benchmarks/{name}", "problem")
    assert len(every) == count
    found = {
        int(every[g.index].where.rpartition(":")[2]): g.reason for g in check_golds(every, pool)
    }
    assert found == unusable
    # Even those are right when they are repeated word for word.
    boxed = [RewardSample("", f"so \\boxed{{{row.answer}}}", row.answer) for row in every]
    assert {scored.reward for scored in pool.score(boxed)} == {1.0}


@pytest.mark.parametrize("name", ["amc", "math500"])
def test_the_gold_of_another_question_is_wrong(pool, name: str) -> None:
    every = rows(f"math_benchmarks/{name}", "problem")
    pairs = [(a.answer, b.answer) for a, b in zip(every, every[7:], strict=False)]
    pairs = [(a, b) for a, b in pairs if a != b]
    scored = pool.score([RewardSample("", f"so \\boxed{{{b}}}", a) for a, b in pairs])
    assert [pair for pair, s in zip(pairs, scored, strict=True) if s.reward] == []
