"""Multiple choice and the format checks: honest completions, and those that try it on."""

from __future__ import annotations

import pytest

from exgrpo_fast.rewards import RewardPool, RewardSample
from exgrpo_fast.rewards.selftest.adversarial import adversarial_answers
from exgrpo_fast.rewards.verifiers.choices import multiple_choice
from exgrpo_fast.rewards.verifiers.functions import boxed_once, think_format


def choice(completion: str, gold: str = "C") -> tuple[float, str]:
    return multiple_choice(["q"], [completion], [gold])[0]


@pytest.mark.parametrize(
    "completion",
    [
        "\\boxed{C}",
        "\\boxed{(C)}",
        "\\boxed{c}",
        "\\boxed{\\text{C}}",
        "\\boxed{\\textbf{(C)}\\ 42}",
        "\\boxed{\\mathrm{C}.}",
        "\\boxed{C) Paris}",
        "\\boxed{C: a vitamin A pill}",
        "(A) is small, (B) is blue, so $\\boxed{(C)}$ it is.",
        "<think>\\boxed{A}</think> \\boxed{C}",
        "It weighs \\boxed{12} kg.\nAnswer: C",
        "reasons\n\nAnswer: C",
        "reasons. Answer: C",
        "reasons\n**Answer:** C.",
        "reasons\nAnswer: **(C)** Paris",
        "reasons\nAnswer:\nC",
        "The correct answer is (C).",
        "Therefore the final answer is C) Paris.",
        "So the answer is option C.",
        "Option C",
        "reasons about A and B.\n(C)",
        "reasons\nC.\n",
        "reasons\n C ",
        "reasons\n**C**",
        "#### C",
        "<answer>(C)</answer>",
        "\\boxed{C}, that is: C\nAnswer: C",
    ],
)
def test_a_chosen_letter_is_right(completion: str) -> None:
    assert choice(completion) == (1.0, "ok")
    assert choice(completion, "\\text{(C)}") == (1.0, "ok")
    assert choice(completion, "D") == (0.0, "wrong")


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "C is the third letter of the alphabet",
        "I think that C may be right, but I cannot say.",
        "Answer: C\nBut who knows",
        "The answer is not (C).",
        "It is not (C)",
        "Answer: C is not what it is",
        "Answer: Carbon",
        "Answer: A dog",
        "A. London\nB. Berlin\nC. Paris",
        "A\nB\nC",
        "(A) (B) (C)",
        "\\boxed{A or C}",
        "\\boxed{C, A}",
        "\\boxed{(C) or (A)}",
        "\\boxed{C) or A)}",
        "\\boxed{C, but A is also fine}",
        "Answer: A\nC",
        "\\boxed{A} or rather \\boxed{C}",
        "\\boxed{A}\nAnswer: C",
        "\\boxed{ABC}",
        "\\boxed{42}",
        "\\boxed{K}",
        "\\boxed{C",
        "Answer: A. Answer: C",
        "Answer: A or C",
        "Answer: A, B, C, D",
        "<answer>A</answer> #### C",
        "<think>\\boxed{C}</think> I do not know",
        "Answer: \\boxed{A}\\boxed{B}\\boxed{C}\\boxed{D}",
    ],
)
def test_letters_that_are_not_chosen_and_two_that_are_count_nothing(completion: str) -> None:
    for gold in "ABCD":
        assert choice(completion, gold) == (0.0, "no_answer")


@pytest.mark.parametrize("gold", ["C", "(C)", "c", "\\text{(C)}", "J"])
def test_a_letter_is_a_gold_answer(gold: str) -> None:
    assert multiple_choice.check_gold(gold, {}) == (1.0, "ok")


@pytest.mark.parametrize("gold", ["", "K", "42", "A or C", "Carbon"])
def test_other_text_is_no_gold_answer(gold: str) -> None:
    assert multiple_choice.check_gold(gold, {}) == (0.0, "no_letter")
    assert choice("\\boxed{C}", gold)[0] == 0.0


def test_nasty_completions_choose_nothing() -> None:
    for adversarial in adversarial_answers():
        assert choice(adversarial.completion)[0] == 0.0, adversarial.name


# --- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("so \\boxed{42}", (1.0, "ok")),
        ("<think>\\boxed{41}</think> \\boxed{42}", (1.0, "ok")),
        ("\\boxed{\\frac{1}{2}}", (1.0, "ok")),
        ("42", (0.0, "no_answer")),
        ("\\boxed{}", (0.0, "no_answer")),
        ("\\boxed{ \u200b}", (0.0, "no_answer")),
        ("\\boxed{42", (0.0, "no_answer")),
        ("\\boxed{42}</think>", (0.0, "no_answer")),
        ("\\boxed{41} or \\boxed{42}", (0.0, "several_boxes")),
        ("\\boxed{\\boxed{42}}", (0.0, "several_boxes")),
        ("\\boxed{42} \\boxed", (0.0, "several_boxes")),
    ],
)
def test_boxed_once(completion: str, expected: tuple[float, str]) -> None:
    assert boxed_once(["q"], [completion]) == [expected]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>two and two</think> 4", (1.0, "ok")),
        ("\n<think>\na\n</think>\n\n4\n", (1.0, "ok")),
        ("4", (0.0, "no_think")),
        ("<think>two and two", (0.0, "no_think")),
        ("two and two</think> 4", (0.0, "no_think")),
        ("well <think>two</think> 4", (0.0, "no_think")),
        ("<think> \n </think> 4", (0.0, "no_think")),
        ("</think><think> 4", (0.0, "no_think")),
        ("<think>two</think>", (0.0, "no_answer")),
        ("<think>two</think> \n", (0.0, "no_answer")),
        ("<think>a<think>b</think> 4", (0.0, "think_twice")),
        ("<think>a</think> 4 <think>b</think> 5", (0.0, "think_twice")),
        ("<think>a</think> 4 </think>", (0.0, "think_twice")),
    ],
)
def test_think_format(completion: str, expected: tuple[float, str]) -> None:
    assert think_format(["q"], [completion]) == [expected]


def test_a_prompt_may_open_the_thoughts() -> None:
    prompt = "<|assistant|><think>\n"
    assert think_format([prompt], ["two and two</think> 4"]) == [(1.0, "ok")]
    assert think_format([prompt], ["<think>two</think> 4"]) == [(0.0, "think_twice")]
    assert think_format([prompt], ["4"]) == [(0.0, "no_think")]


def test_formats_are_added_to_a_reward_that_knows_the_answer() -> None:
    samples = [RewardSample("q", f"<think>hm</think> \\boxed{{{a}}}", "C") for a in "CD"]
    names = ["multiple_choice", "boxed_once", "think_format"]
    with RewardPool(names, weights=[1.0, 0.1, 0.1], workers=1) as pool:
        assert [round(v.reward, 3) for v in pool.score(samples)] == [1.2, 0.2]
        assert [v.reason for v in pool.score(samples)] == ["ok", "wrong"]
        golds = pool.score([RewardSample("", "", a) for a in ("C", "Z")], checking_gold=True)
        assert [v.reason for v in golds] == ["ok", "no_letter"]
