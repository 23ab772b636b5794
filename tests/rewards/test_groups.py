"""Rewards relative to the other completions of a question, and what counts as correct."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_collector import scripted

from exgrpo_fast.core.types import Verdict
from exgrpo_fast.rewards import RewardError, RewardPool, RewardSample
from exgrpo_fast.training.collector import PhaseTimer

REWARDS = '''
import time

def shortest(completions, answer, **columns):
    """1 for the shortest correct completion of the group, 0.5 for the other correct ones."""
    correct = [c.endswith(a) for c, a in zip(completions, answer)]
    best = min((len(c) for c, ok in zip(completions, correct) if ok), default=0)
    return [1.0 if ok and len(c) == best else 0.5 * ok for c, ok in zip(completions, correct)]

shortest.per_group = True

def size(prompts, completions, level, **columns):
    assert len(prompts) == len(completions) == len(level)
    return [float(len(completions))] * len(completions)

size.per_group = True

def rank(completions, **columns):
    return [float(sum(other < c for other in completions)) for c in completions]

rank.per_group = True

def too_few(completions, **columns):
    return [1.0]

too_few.per_group = True

def slow(completions, **columns):
    time.sleep(0.15 * len(completions))
    return [1.0] * len(completions)

slow.per_group = True

def alone(completions, **columns):
    return [float(len(completions))]

def one(completion):
    return 1.0

one.per_group = True

def share(completions, **columns):
    return [float(c.rpartition(" ")[2]) for c in completions]

def right(completions, **columns):
    return [float("right" in c) for c in completions]

def short(completions, **columns):
    return [float(len(c) < 8) for c in completions]

def no_opinion(completions, **columns):
    return [None for _ in completions]
'''


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "grouped.py"
    path.write_text(REWARDS)
    return path


def samples(*pairs: tuple[str, str], **columns: Any) -> list[RewardSample]:
    return [RewardSample(prompt, text, "7", columns) for prompt, text in pairs]


# --- groups ---------------------------------------------------------------------------------------


def test_a_per_group_reward_gets_the_completions_of_a_question_together(rewards) -> None:
    pairs = [("p", "so 7"), ("q", "it is 7"), ("p", "7"), ("q", "8"), ("p", "6"), ("p", "so 7")]
    with RewardPool([f"{rewards}:shortest"], workers=2) as pool:
        found = [s.reward for s in pool.score(samples(*pairs))]
    assert found == [0.5, 1.0, 1.0, 0.0, 0.0, 0.5]


def test_they_are_together_although_they_were_handed_in_one_by_one(rewards) -> None:
    names = [f"{rewards}:size", f"{rewards}:alone", "exact"]
    with RewardPool(names, weights=[1.0, 100.0, 0.0], workers=2) as pool:
        pool.check()
        future = pool.submit([])
        for prompt in "pqpppqq":
            pool.submit(samples((prompt, "same"), level=1), append_to=future)
            pool.poll()
        assert not future.done
        assert [s.reward - 100.0 for s in pool.verdicts(future)] == [4, 3, 4, 4, 4, 3, 3]


def test_rows_without_a_prompt_are_no_group(rewards) -> None:
    with RewardPool([f"{rewards}:size"], workers=1) as pool:
        found = pool.score(samples(("", "a"), ("", "a"), level=1))
    assert [s.reward for s in found] == [1.0, 1.0]


def test_a_group_has_the_time_of_its_samples_and_shares_its_fate(rewards) -> None:
    group = samples(("p", "a"), ("p", "b"), ("p", "c"))
    with RewardPool([f"{rewards}:slow"], workers=1, timeout_seconds=0.3) as pool:
        assert {s[:2] for s in pool.score(group)} == {(1.0, "ok")}
    with RewardPool([f"{rewards}:slow"], workers=1, timeout_seconds=0.1) as pool:
        assert [s[:2] for s in pool.score(group)] == [(0.0, "timeout")] * 3
    with RewardPool([f"{rewards}:too_few"], workers=1) as pool:
        assert [s[:2] for s in pool.score(group)] == [(0.0, "not_a_number")] * 3
        assert pool.fault == "reward grouped.py:too_few: returned 1 rewards for 3 completions"


def test_a_function_of_one_completion_cannot_be_per_group(rewards) -> None:
    with RewardPool([f"{rewards}:one"], workers=1) as pool:
        with pytest.raises(RewardError, match="per_group needs a parameter 'completions'"):
            pool.check()


def test_a_training_step_and_its_replay_are_judged_as_groups(
    tokenizer, make_test_trainer, rewards
) -> None:
    trainer, engine = scripted(
        tokenizer,
        make_test_trainer,
        "abcd",
        {"a": "0000", "b": "0000", "c": "0000", "d": "0000"},
        reward={"functions": [f"{rewards}:rank"], "workers": 1},
        replay={"enabled": False},
    )
    engine.lines.clear()
    for name in "abcd":
        engine.expect(name, "b", "a", "d", "c")
    batch = trainer.collector.collect(1, PhaseTimer())
    assert [g.rewards for g in batch.groups] == [[1.0, 0.0, 3.0, 2.0]] * 4


# --- correct --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights", [[0.7, 0.2, 0.1], [0.1, 0.7, 0.2], [1 / 3, 1 / 3, 1 / 3], [1.0, 0.5, 0.1], [2, 1, 1]]
)
def test_full_marks_are_counted_by_function_whatever_the_weights(rewards, weights) -> None:
    names = [f"{rewards}:right", f"{rewards}:short", f"{rewards}:no_opinion"]
    with RewardPool([*names[:2], f"{rewards}:right"], weights=weights, workers=1) as pool:
        found = pool.score(samples(("p", "right"), ("p", "wrong"), ("p", "right and long")))
    assert [s.successful for s in found] == [True, False, False]
    assert found[0].reward == pytest.approx(sum(weights))
    with RewardPool(names, weights=weights, workers=1) as pool:
        found = pool.score(samples(("p", "right"), ("p", "right and long")))
    assert [s.successful for s in found] == [True, False]


def test_form_alone_is_never_correct(rewards) -> None:
    """With a sum, a wrong completion of the right length would have earned 1."""
    with RewardPool([f"{rewards}:right", f"{rewards}:short"], workers=1) as pool:
        [wrong] = pool.score(samples(("p", "wrong")))
    assert (wrong.reward, wrong.successful) == (1.0, False)


def test_a_penalty_must_be_avoided_and_a_zero_weight_is_ignored(rewards) -> None:
    names = [f"{rewards}:right", f"{rewards}:short", f"{rewards}:no_opinion"]
    with RewardPool(names, weights=[1.0, -0.5, 1.0], workers=1) as pool:
        found = pool.score(samples(("p", "right"), ("p", "right and long")))
    assert [s.successful for s in found] == [False, True]
    with RewardPool(names, weights=[1.0, 0.0, 1.0], workers=1) as pool:
        assert [s.successful for s in pool.score(samples(("p", "right and long")))] == [True]
    with RewardPool([f"{rewards}:no_opinion"], workers=1) as pool:
        assert [s.successful for s in pool.score(samples(("p", "right")))] == [False]


@pytest.mark.parametrize(
    ("reward", "correct"),
    [("1", True), ("0.99999999", True), ("1.5", True), ("0.999", False), ("0", False)],
)
def test_a_single_reward_is_correct_at_one(rewards, reward: str, correct: bool) -> None:
    with RewardPool([f"{rewards}:share"], workers=1) as pool:
        [found] = pool.score(samples(("p", f"worth {reward}")))
    assert found.successful == correct


def test_the_trainer_counts_them_as_correct(tokenizer, make_test_trainer, rewards) -> None:
    names = [f"{rewards}:right", f"{rewards}:right", f"{rewards}:right"]
    trainer, _ = scripted(
        tokenizer,
        make_test_trainer,
        "abcd",
        {"a": "1000", "b": "1111", "c": "0000", "d": "0110"},
        reward={"functions": names, "weights": [0.7, 0.2, 0.1], "workers": 1},
    )
    _, metrics = trainer.step()
    assert metrics["pass_at_1"] == pytest.approx(metrics["reward_mean"]) == 7 / 16


def test_a_verdict_made_by_hand_is_correct_at_one() -> None:
    assert [Verdict(r).successful for r in (1.0, 0.5)] == [True, False]
    assert Verdict(0.9999999999999999, correct=True).successful
