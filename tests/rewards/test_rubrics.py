"""Rubrics: what each of them accepts, how they weigh up, and how they travel through the pool."""

from __future__ import annotations

import logging
import re
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exgrpo_fast.build.quickstart.solutions import worked_solution
from exgrpo_fast.rewards import RewardError, RewardPool, RewardSample, Rubric, check_reference
from exgrpo_fast.rewards.loading import load_function
from exgrpo_fast.rewards.rubrics.rubrics import (
    MATHS_RUBRICS,
    SUMS_RUBRICS,
    RubricReward,
    boxed_once,
    no_meta,
    steps_true,
    weighted_share,
)

OWN = """
import re
from exgrpo_fast.rewards import Rubric

def polite(prompt, response, context):
    return "please" in response

def level(prompt, response, context):
    return context["level"] == 3

def breaks(prompt, response, context):
    raise ValueError("no idea")

def forgets(prompt, response, context):
    re.search("x", response)

async def waits(prompt, response, context):
    return False

def sleeps(prompt, response, context):
    import time
    time.sleep(60)

OWN = [
    Rubric("polite", 3, polite, "is polite"),
    Rubric("level", None, level),
    Rubric("better", 2, lambda prompt, response, context: response > context["draft"],
           "is better than before", applies_to="revision"),
]
BREAKS = [Rubric("polite", 3, polite), Rubric("breaks", 1, breaks)]
FORGETS = [Rubric("forgets", 1, forgets)]
WAITS = [Rubric("waits", 1, waits)]
SLEEPS = [Rubric("sleeps", 1, sleeps)]
MIXED = [Rubric("polite", 1, polite), Rubric("kind", 2, public_text="is kind")]
JUDGED = (Rubric("kind", 2, public_text="is kind"),)
EMPTY = []
STRINGS = ["polite"]
WEIGHTLESS = [Rubric("polite", -1, polite), Rubric("later", 1, polite, applies_to="revision")]
TWICE = [Rubric("polite", 1, polite), Rubric("polite", 1, level)]
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rubrics") / "own.py"
    path.write_text(OWN)
    return path


def checks_of(rubrics: list[Rubric], response: str, answer: str, **columns: Any) -> dict[str, bool]:
    values = {name: [value] for name, value in columns.items()}
    [result] = RubricReward(rubrics)(["q"], [response], answer=[answer], **values)
    return dict(result.checks)


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "met", "share"),
    [
        ([3, 2, 1], [1, 0, 1], 4 / 6),  # HeRL's specification, oracle H1
        ([8, 1, 1], [0, 1, 1], 0.2),
        ([5, None, -2], [1, 1, 1], 1.0),
        ([5, None, -2], [0, 1, 0], 1 / 6),
        ([5, None, -2], [1, 1, 0], 1.0),
    ],
)
def test_the_reward_is_the_share_of_the_weight(weights, met, share) -> None:
    assert weighted_share(weights, met) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("rubrics", [MATHS_RUBRICS, SUMS_RUBRICS])
def test_a_wrong_answer_never_outweighs_a_right_one(rubrics) -> None:
    for asked in (rubrics, [r for r in rubrics if r.applies_to == "all"]):
        names = [rubric.name for rubric in asked]
        weights = [rubric.weight for rubric in asked]
        assert weighted_share(weights, [name != "answer_correct" for name in names]) <= 0.2
        assert weighted_share(weights, [True] * len(names)) == 1.0  # exactly: it is a success


# --- the built-in checks --------------------------------------------------------------------------

RIGHT = r"It is $6\cdot 7$, so the answer is $\boxed{42}$."


@pytest.mark.parametrize(
    ("response", "columns", "unmet"),
    [
        (RIGHT, {}, []),
        (RIGHT, {"draft": "earlier"}, []),
        ("\\[\n\\boxed{\\frac{84}{2}}\n\\]\n", {}, []),
        (r"<think>\boxed{41}</think> \boxed{42}", {}, []),
        (r"so \boxed{41}", {}, ["answer_correct"]),
        (r"\boxed{42} and again \boxed{42}", {}, ["boxed_once"]),
        (r"first \boxed{41}, then \boxed{42}", {}, ["boxed_once"]),
        ("\\boxed{42}\nI hope that this helps.", {}, ["boxed_once"]),
        (r"\boxed{}", {}, ["answer_correct", "boxed_once"]),
        ("#### 42", {}, ["answer_correct", "boxed_once"]),
        (RIGHT, {"truncated": True}, ["finished"]),
        ("", {"truncated": True}, ["answer_correct", "boxed_once", "finished"]),
        (f"The earlier draft was wrong. {RIGHT}", {"draft": "x"}, ["no_meta"]),
        (f"The earlier draft was wrong. {RIGHT}", {}, []),  # asked of revisions only
    ],
)
def test_maths_rubrics(response: str, columns: dict[str, Any], unmet: list[str]) -> None:
    checks = checks_of(MATHS_RUBRICS, response, "42", **columns)
    assert [name for name, met in checks.items() if not met] == unmet
    assert ("no_meta" in checks) == ("draft" in columns)


@pytest.mark.parametrize(
    "text",
    [
        "My previous attempt missed a sign.",
        "Here is the corrected solution.",
        "According to the feedback, the sum is wrong.",
        "The feedback says that a sign is missing.",
        "The rubric asks for a box.",
        "There was an error in the solution:",
        "I was asked to revise it.",
        "IN THE FIRST DRAFT we had x = 2",
        "The unmet requirement was the box",
    ],
)
def test_talk_about_an_earlier_version_is_found(text: str) -> None:
    assert not no_meta("q", text, {})


@pytest.mark.parametrize(
    "text",
    [
        "The first solution of the equation is x = 2; substitute the previous equation.",
        "A ship with a draft of 3 m; the feedback coefficient is 2.",
        "We revise the estimate: the error in x is below 0.1. The last answer choice is (E).",
    ],
)
def test_mathematics_is_no_talk(text: str) -> None:
    assert no_meta("q", text, {})


@pytest.mark.parametrize("piece", ["\\boxed{", "\\boxed{1}", " ", "\n", "previous ", "1+", "="])
def test_checks_are_quick_on_any_text(piece: str) -> None:
    response = piece * 20_000 + "x"
    assert not boxed_once("q", response, {})
    assert not steps_true("q", response, {})
    assert no_meta("q", response, {})


@pytest.mark.parametrize(
    ("response", "met"),
    [
        ("1+2=3\n<answer>3</answer>", True),
        ("12-15=-3\n-3+5=2\n<answer>2</answer>", True),
        ("1 + 2 - 4 = -1", True),
        ("1+2=4\n<answer>4</answer>", False),
        ("1+2=3\n3+4=8", False),
        ("<answer>3</answer>", False),
        ("1*3=3", False),
        ("3=3", False),
        ("1+2=3=3", False),
        ("1+2=x", False),
        ("\uff11+\uff12=\uff13", False),
        ("1" * 5000 + "+1=2", False),
    ],
)
def test_steps_true(response: str, met: bool) -> None:
    assert steps_true("q", response, {}) is met


def gym_columns(expression: str) -> dict[str, str]:
    return {"reasoning_gym": "chain_sum", "metadata": repr({"expression": expression})}


def test_sums_rubrics_accept_the_quickstarts_solutions() -> None:
    pytest.importorskip("reasoning_gym")
    columns = gym_columns("12 - 5 + 7")
    worked = worked_solution("12 - 5 + 7")
    assert all(checks_of(SUMS_RUBRICS, worked, "14", **columns).values())
    checks = checks_of(SUMS_RUBRICS, "<answer>13</answer>", "14", **columns)
    assert [name for name, met in checks.items() if not met] == ["answer_correct", "steps_true"]
    twice = checks_of(SUMS_RUBRICS, worked + "<answer>14</answer>", "14", **columns)
    assert [name for name, met in twice.items() if not met] == ["answer_once"]


def test_public_texts_are_there_and_never_hold_the_answer() -> None:
    for rubric in [*MATHS_RUBRICS, *SUMS_RUBRICS]:
        assert rubric.public_text and not re.search(r"\d|reference|gold", rubric.public_text)


# --- the set as a reward --------------------------------------------------------------------------


def test_the_reason_is_the_heaviest_unmet_one(own) -> None:
    judge = load_function(f"{own}:OWN")

    def outcome(response: str, **columns: Any) -> tuple[Any, ...]:
        return judge(["q"], [response], **{name: [value] for name, value in columns.items()})[0]

    assert outcome("please", level=3) == (1.0, "ok", "", (("polite", True), ("level", True)))
    assert outcome("please", level=2)[:2] == (0.75, "unmet:level")
    assert outcome("thanks", level=2)[:2] == (0.0, "unmet:polite")
    assert outcome("please b", level=3, draft="z")[:2] == (4 / 6, "unmet:better")
    assert outcome("please b", level=2, draft="z")[:2] == (0.5, "unmet:better")
    several = judge(["q"] * 2, ["please", "thanks"], level=[3, 3])
    assert [result.reward for result in several] == [1.0, 0.25]


def test_a_check_that_breaks_is_unmet_and_said(own, caplog) -> None:
    samples = [RewardSample("q", text, "a") for text in ("please", "please!", "thanks")]
    with RewardPool([f"{own}:BREAKS"], workers=1) as pool, caplog.at_level(logging.WARNING):
        scored = pool.score(samples)
        with pytest.raises(RewardError, match=r"rubric 'breaks': ValueError: no idea \(own.py, li"):
            pool.check()
    assert [s[:2] for s in scored] == [(0.75, "error:ValueError")] * 2 + [(0.0, "error:ValueError")]
    assert scored[0].checks == (("polite", True), ("breaks", False))
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("name", "kind"), [("FORGETS", "NoneType"), ("WAITS", "coroutine")])
def test_a_check_has_to_say_true_or_false(own, name: str, kind: str) -> None:
    with RewardPool([f"{own}:{name}"], workers=1) as pool:
        with pytest.raises(RewardError, match=f"TypeError: returned {kind} instead of True or F"):
            pool.check()


def test_checks_and_public_texts_come_through_the_pool(own) -> None:
    sample = RewardSample("q", "please", "42", {"level": 2, "draft": "a"})
    with RewardPool([f"{own}:OWN"], workers=1) as pool:
        assert pool.rubrics == {}
        [verdict] = pool.score([sample])
        assert verdict.checks == (("polite", True), ("level", False), ("better", True))
        assert (verdict.reward, verdict.reason, verdict.scored) == (5 / 6, "unmet:level", True)
        assert pool.rubrics == {
            "polite": ("is polite", 3.0, "all", False),
            "level": ("", 1.0, "all", False),
            "better": ("is better than before", 2.0, "revision", False),
        }


def test_an_overlong_check_costs_its_sample_only(own) -> None:
    with RewardPool([f"{own}:SLEEPS"], workers=1, timeout_seconds=0.5) as pool:
        [scored] = pool.score([RewardSample("q", "please", "a")])
    assert (scored.reward, scored.reason, scored.checks) == (0.0, "timeout", ())


def test_built_in_sets_run_in_the_pool_with_other_rewards() -> None:
    with RewardPool(["maths_rubrics", "exact"], weights=[1, 10], workers=1) as pool:
        pool.check()
        scored = pool.score([RewardSample("q", RIGHT, "42"), RewardSample("q", "42", "42")])
        gold = pool.score([RewardSample("", "", "\\frac{1}{2")], checking_gold=True)
    assert [s.reward for s in scored] == [11.0, 10 + 0.5 / 9.5]
    assert [s.reason for s in scored] == ["ok", "unmet:answer_correct"]
    assert gold[0].reason == "unbalanced"  # as math_verify says


# --- mistakes -------------------------------------------------------------------------------------


def test_sets_are_referenced_like_rewards(own) -> None:
    assert check_reference("maths_rubrics") == "maths_rubrics"
    assert check_reference(f"{own}:OWN") == f"{own}:OWN"
    with pytest.raises(RewardError, match="did you mean 'maths_rubrics'"):
        check_reference("math_rubrics")
    with pytest.raises(RewardError, match=f"no file .*owner.py; did you mean '{own}'"):
        check_reference(f"{own.with_name('owner.py')}:OWN")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("MIXD", "no function 'MIXD' in .*; rubrics there: OWN, .*; did you mean 'MIXED'"),
        ("EMPTY", "own.py:EMPTY': the list is empty; expected at least one Rubric"),
        ("STRINGS", "entry 0 is a str, expected a Rubric"),
        ("WEIGHTLESS", "all weights are 0"),
        ("TWICE", "two rubrics are called 'polite'"),
    ],
)
def test_a_set_that_makes_no_reward_is_one_line(own, name: str, message: str) -> None:
    with RewardPool([f"{own}:{name}"], workers=1) as pool:
        with pytest.raises(RewardError, match=message) as error:
            pool.check()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": " "}, "a rubric needs a name"),
        ({"weight": "3"}, "rubric 'r': weight '3' is not a number"),
        ({"weight": float("nan")}, "weight nan is not a number"),
        ({"check": "polite"}, "rubric 'r': its check is no function"),
        ({"check": None, "public_text": ""}, "rubric 'r': no check, and no public_text"),
        ({"applies_to": "revisions"}, "applies_to is 'all' or 'revision', got 'revisions'"),
    ],
)
def test_a_rubric_that_nobody_could_decide_is_refused(change, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        replace(Rubric("r", 1.0, no_meta, "text"), **change)


def test_a_mistake_in_a_rubric_of_a_file_is_one_line(tmp_path) -> None:
    (tmp_path / "bad.py").write_text(
        textwrap.dedent("""
        from exgrpo_fast.rewards import Rubric
        SET = [Rubric("r", applies_to="never", check=print)]
    """)
    )
    with RewardPool([f"{tmp_path}/bad.py:SET"], workers=1) as pool:
        with pytest.raises(RewardError, match="^rubric 'r': applies_to is"):
            pool.check()
