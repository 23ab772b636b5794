"""The forms that a user's function may have: TRL's lists, `async`, one sample at a time; and None."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import pytest

from exgrpo_fast.rewards import RewardError, RewardPool, RewardSample

FORMS = '''
import asyncio

def trl_number(prompts, completions, answer, **kwargs):
    """As in TRL's documentation: everything is a list."""
    return [float(c == a) for c, a in zip(completions, answer)]

async def trl_async(prompts, completions, answer, **kwargs):
    async def one(text, gold):
        await asyncio.sleep(0.001)
        return float(text == gold)
    return await asyncio.gather(*[one(c, a) for c, a in zip(completions, answer)])

def single(prompt, completion, answer, **columns) -> float:
    assert isinstance(prompt, str) and isinstance(columns.get("level", 0), int)
    return float(completion == answer)

async def single_async(completion, answer):
    await asyncio.sleep(0.001)
    return float(completion == answer), "awaited"

def single_with_column(completion, level):
    return level / 10

def opinion(prompt, completion, **columns):
    return None if completion == "none" else 1.0

def opinions(completions, **kwargs):
    return [None if c == "none" else 0.5 for c in completions]

def forgot(completions, **kwargs):
    [0.5]

async def never(completion):
    await asyncio.sleep(60)

async def fails(completion):
    raise ValueError("in the middle")

def reasons(completion, answer):
    """Says what the completion says."""
    if completion.startswith("raise"):
        raise KeyError(completion)
    return (1.0, "ok") if completion == "right" else (0.0, completion)
'''


@pytest.fixture(scope="module")
def forms(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "forms.py"
    path.write_text(FORMS)
    return path


def samples(*completions: str, **columns) -> list[RewardSample]:
    return [RewardSample("q", text, "42", columns) for text in completions]


@pytest.mark.parametrize("name", ["trl_number", "trl_async", "single", "single_async"])
def test_every_form_says_the_same(forms, name: str) -> None:
    with RewardPool([f"{forms}:{name}"], workers=1) as pool:
        pool.check()
        verdicts = pool.score(samples("42", "41", level=3))
    assert [v.reward for v in verdicts] == [1.0, 0.0]
    assert {v.reason for v in verdicts} == {"awaited" if name == "single_async" else "ok"}


def test_one_sample_at_a_time_gets_columns_as_they_are(forms) -> None:
    with RewardPool([f"{forms}:single_with_column"], workers=1) as pool:
        assert pool.score(samples("x", level=3))[0].reward == 0.3
        with pytest.raises(RewardError, match="asks for the column 'level'; columns there: answer"):
            pool.check(*samples("x"))


def test_none_is_unscored_unless_another_function_has_an_opinion(forms) -> None:
    for name in ("opinion", "opinions"):
        with RewardPool([f"{forms}:{name}"], workers=1) as pool:
            none, some = pool.score(samples("none", "some"))
            assert (none.reward, none.reason, none.scored) == (0.0, "unscored", False)
            assert some.scored and some.reward > 0
    with RewardPool([f"{forms}:opinion", f"{forms}:opinions", "exact"], workers=1) as pool:
        none, some = pool.score(samples("none", "42"))
        assert (none.reward, none.scored, some.reward, some.scored) == (0.0, True, 2.5, True)


def test_a_list_function_without_a_return_is_a_mistake(forms) -> None:
    with RewardPool([f"{forms}:forgot"], workers=1) as pool:
        with pytest.raises(RewardError, match="returned None instead of a list; is a `return`"):
            pool.check()


def test_async_functions_are_stopped_and_may_fail(forms) -> None:
    with RewardPool([f"{forms}:never"], workers=1, timeout_seconds=0.5) as pool:
        assert pool.score(samples("x"))[0].reason == "timeout"
        assert pool.score(samples("y"))[0].reason == "timeout"  # the worker is fit for the next
    with RewardPool([f"{forms}:fails"], workers=1) as pool:
        assert pool.score(samples("x"))[0].reason == "error:ValueError"


def test_reasons_are_kept_and_counted_as_they_are(forms, caplog) -> None:
    said = ["right", "wrong", "wrong", "no_answer", "refused:equals", "raise 1", "raise 2"]
    with RewardPool([f"{forms}:reasons"], workers=2) as pool, caplog.at_level(logging.WARNING):
        counts = Counter(v.reason for v in pool.score(samples(*said)))
    assert counts == {
        "ok": 1, "wrong": 2, "no_answer": 1, "refused:equals": 1, "error:KeyError": 2
    }  # fmt: skip
    assert len(caplog.records) == 1


def test_a_gold_answer_is_parsed_once_in_a_worker() -> None:
    """Many responses to a question with a formula for an answer: one parse of the gold."""
    from exgrpo_fast.rewards.verifiers.mathematics import _parse_gold, math_verify

    _parse_gold.cache_clear()
    for number in range(5):
        math_verify(["q"], [f"\\boxed{{\\frac{{{number}}}{{7}}}}"], ["\\frac{x}{7}"])
    assert (_parse_gold.cache_info().misses, _parse_gold.cache_info().hits) == (1, 4)
