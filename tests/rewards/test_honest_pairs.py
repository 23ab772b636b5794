"""Verdicts on what models and data sets write, beside those of math-verify alone.

`honest_pairs.jsonl` has a gold answer, a completion, the question where that matters, whether it is
right, and why math-verify says otherwise where it does.
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from exgrpo_fast.rewards.verifiers.gold_form import in_form_of
from exgrpo_fast.rewards.verifiers.intervals import as_intervals, half_open_as_in_english
from exgrpo_fast.rewards.verifiers.mathematics import math_verify
from exgrpo_fast.rewards.verifiers.notation import latex
from exgrpo_fast.rewards.verifiers.quantities import in_unit_of, quantity, rational
from exgrpo_fast.rewards.verifiers.words import as_date, in_digits, same_text, time_in_form_of

PAIRS = [
    json.loads(line)
    for line in (Path(__file__).parent / "honest_pairs.jsonl").read_text().splitlines()
]


def verdicts(pairs: list[dict[str, Any]]) -> list[bool]:
    columns = {name: [pair[name] for pair in pairs] for name in ("gold", "completion")}
    prompts = [pair.get("prompt", "") for pair in pairs]
    scored = math_verify(prompts, columns["completion"], columns["gold"])
    return [reward == 1.0 for reward, _ in scored]


def test_the_table_is_large_and_has_both_kinds() -> None:
    right = [pair for pair in PAIRS if pair["right"]]
    assert len(right) >= 300 and len(PAIRS) - len(right) >= 300
    assert len({(pair["gold"], pair["completion"]) for pair in PAIRS}) == len(PAIRS)


def test_no_honest_answer_is_refused_and_no_wrong_one_accepted() -> None:
    wrong = [
        (pair["gold"], pair["completion"], "accepted" if verdict else "refused")
        for pair, verdict in zip(PAIRS, verdicts(PAIRS), strict=True)
        if verdict != pair["right"]
    ]
    assert wrong == []


@pytest.mark.slow
def test_every_disagreement_with_math_verify_is_explained() -> None:
    alone: Any = importlib.import_module("math_verify")
    different = []
    for pair in PAIRS:
        gold = alone.parse(f"${pair['gold']}$", parsing_timeout=None)
        found = alone.parse(pair["completion"], parsing_timeout=None)
        agrees = bool(alone.verify(gold, found, timeout_seconds=None)) == pair["right"]
        if agrees == ("math_verify_differs" in pair):
            different.append((pair["gold"], pair["completion"]))
    assert different == []


def test_the_explanations_are_few() -> None:
    reasons = Counter(pair.get("math_verify_differs") for pair in PAIRS)
    assert len(reasons) <= 30 and reasons[None] > 0.8 * len(PAIRS)


# --- the parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1\\frac{1}{2}", "3/2"),
        ("\\frac12", "1/2"),
        ("-\\frac{3}{4}", "-3/4"),
        ("2^{-99}", "1/633825300114114700748351602688"),
        ("\\frac{1}{2^{98}}", "1/316912650057057350374175801344"),
        ("6 \\cdot 7 + 1", "43"),
        ("-2^2", "-4"),
        ("(-2)^2", "4"),
        ("\\frac{5!}{2! \\cdot 3!}", "10"),
        ("8 / 4 / 2", "1"),
        ("2 - 3 - 4", "-5"),
        (".5", "1/2"),
    ],
)
def test_rational_expressions_have_their_exact_value(text: str, value: str) -> None:
    assert str(rational(text)) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "1/0",
        "\\frac{1}{0}",
        "9^{9^{9}}",
        "2^{3000000000}",
        "(9^9)^{9999}",
        "1000!",
        "(9!)!",
        "3!!",
        "2^{0.5}",
        "41=42",
        "1,2",
        "2(3)",
        "(" * 20 + "1" + ")" * 20,
        "1+" * 200 + "1",
        "{1",
        "1\\frac{3}{2}",
    ],
)
def test_anything_else_has_none(text: str) -> None:
    assert rational(text) is None


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("12\\ \\mathrm{cm^2}", 12, "cm 2"),
        ("12 \\text{ square units}", 12, "square units"),
        ("10 km/h", 10, "km/h"),
        ("20 million", 20_000_000, ""),
        ("x = 7 \\text{ m}", 7, "m"),
        ("62.5\\%", 62.5, "%"),
        ("90^\\circ", 90, "degrees"),
        ("5cm", 5, "cm"),
    ],
)
def test_a_unit_is_told_from_its_number(text: str, value: float, unit: str) -> None:
    assert quantity(latex(text)) == (value, unit)


@pytest.mark.parametrize(
    "text",
    [
        "42 \\text{ or } 41",
        "42 \\text{ (41)}",
        "42 \\text{ is wrong}",
        "42 \\text{ maybe}",
        "3 x",
        "3x",
        "2 \\sin",
        "5 log",
        "2ab",
        "\\text{Evelyn}",
    ],
)
def test_what_is_no_unit(text: str) -> None:
    assert quantity(latex(text)) is None


@pytest.mark.parametrize(
    ("gold", "found", "value"),
    [
        ("2 kg", "500 g", "1/2"),
        ("20 m/s", "72 km per hour", "20"),
        ("1 m^2", "5 square cm", "1/2000"),
        ("250 mL", "2 cubic centimeters", "2"),
        ("12 cm^2", "12 cm^3", None),
        ("20 m/s", "20 m s^{-1}", "20"),
        ("20 m/s", "20 s/m", None),
        ("60^\\circ", "60 radians", None),
        ("\\$45", "45 cents", "9/20"),
        ("330 min", "5 hours 30 minutes", "330"),
        ("5 hours 30 minutes", "330 min", "11/2"),
        ("12 in", "12 inches", "12"),
        ("7", "7 cm", "7"),
        ("7 apples", "7 pears", "7"),
        ("7 cm", "7 hours", None),
        ("7 cm", "7 in", None),
        ("6 V", "6000 mV", "6"),
        ("6 mW", "6 MW", "6000000000"),
        ("2400 J", "2.4 kJ", "2400"),
        ("3 Pa", "3 N / m^2", "3"),
        ("3 Pa", "3 N", None),
        ("5.4 cents", "5.4 cents per ounce", "27/5"),
    ],
)
def test_a_quantity_in_the_gold_unit(gold: str, found: str, value: str | None) -> None:
    of_gold, of_found = quantity(latex(gold)), quantity(latex(found))
    assert of_gold and of_found
    assert in_unit_of(of_gold, of_found) == (value and Fraction(value))


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("5 \\text{ hours and } 30 \\text{ minutes}", "11/2", "hours"),
        ("6 ft, 3 in", "25/4", "ft"),
        ("6'3\"", "25/4", "ft"),
        ("36^\\circ 52' 12''", "3687/100", "degrees"),
        ("1 day 2 hours 3 min", "1563/1440", "day"),
    ],
)
def test_quantities_in_several_units(text: str, value: str, unit: str) -> None:
    assert quantity(latex(text)) == (Fraction(value), unit)


@pytest.mark.parametrize("text", ["5 minutes 3 hours", "5 hours 3 cm", "5 h 3 h", "5 cats 3 dogs"])
def test_what_is_no_quantity_in_several_units(text: str) -> None:
    assert quantity(latex(text)) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x<2 \\text{ or } x \\geq 3", "(-\\infty, 2) \\cup [3, \\infty)"),
        ("x < 5 \\text{ and } x \\geq -3", "[-3, 5)"),
        ("x>0, x<5", "(0, 5)"),
        ("-1 \\leq x < 1", "[-1, 1)"),
        ("5 > x > 0", "(0, 5)"),
        ("1<x<2 \\text{ or } x>3", "(1, 2) \\cup (3, \\infty)"),
        ("x \\geq 5 \\text{ or } x = 3", "[5, \\infty) \\cup \\{3\\}"),
        ("0 < x < 36, x \\neq 9", "(0, 36) \\setminus \\{9\\}"),
        ("x \\neq 1 \\text{ and } x \\neq 2", "\\mathbb{R} \\setminus \\{1, 2\\}"),
        ("x>5, x<2", "(-\\infty, 2) \\cup (5, \\infty)"),
        ("\\frac{1}{2} < m", "m > \\frac{1}{2}"),
    ],
)
def test_inequalities_as_intervals(text: str, expected: str) -> None:
    assert as_intervals(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "x<2",
        "x>2 \\text{ and } x>3",
        "x>2, y<3",
        "1<x>2",
        "x = 1 \\text{ or } x = 2",
        "x<y<3",
        "42 or 41",
    ],
)
def test_what_is_no_interval(text: str) -> None:
    assert as_intervals(text) == text


def test_half_open_intervals_as_in_english() -> None:
    french = "]-\\infty,1[ \\cup [2;3["
    assert half_open_as_in_english(french) == "(-\\infty, 1) \\cup [2, 3)"
    assert half_open_as_in_english("]1, 2[, 3") == "]1, 2[, 3"


@pytest.mark.parametrize("text", ["the 4th of July", "4 July", "July 4th", "Jul. 4"])
def test_dates(text: str) -> None:
    assert as_date(text) == "July 4"
    assert as_date(f"{text} 2024") == "July 4, 2024"


@pytest.mark.parametrize(
    "text", ["4 apples", "July", "July 32", "4 July 5", "July 4 2024 1", "June or July 4", "4 ma"]
)
def test_what_is_no_date(text: str) -> None:
    assert as_date(text) == text


@pytest.mark.parametrize(
    ("gold", "found", "same"),
    [
        ("3:30 PM", "15:30", True),
        ("3:30 PM", "3:30", False),
        ("9:05 AM", "9:05", True),
        ("9:05 AM", "21:05", False),
        ("9:05", "9:05 PM", True),
        ("12:30 AM", "0:30", True),
        ("12:15 PM", "12:15", True),
        ("16:30", "4:30 PM", True),
        ("16:30", "4:30 AM", False),
    ],
)
def test_times_of_day(gold: str, found: str, same: bool) -> None:
    assert (time_in_form_of(gold, found) == gold) == same


@pytest.mark.parametrize(
    ("gold", "found", "expected"),
    [
        ("(3, -1)", "y = -1, x = 3", "(3, -1)"),
        ("(2, 3)", "m = 2, b = 3", "(2, 3)"),
        ("p = 4, q = 7", "(7, 4)", "p = 7, q = 4"),
        ("p = 4, q = 7", "q = 7, p = 4", "p = 4, q = 7"),
        ("\\frac{11}{4}", "2-3/4", "\\frac{11}{4}"),
        ("\\frac{5}{4}", "2-3/4", "2-3/4"),
        ("60^\\circ", "\\frac{2\\pi}{6}", "\\frac{2\\cdot 180}{6}"),
        ("\\frac{\\pi}{6}, \\pi", "30^\\circ, \\pi", "\\frac{30 \\cdot \\pi}{180}, \\pi"),
        ("0.25", "P(X>1)=0.25", "0.25"),
        ("(3, 4)", "\\vec{v} = (3, 4)", "(3, 4)"),
        ("3", "\\sin(x) = 3", "\\sin(x) = 3"),
        ("3", "2x = 3", "2x = 3"),
        ("1234567", "12,34,567", "1234567"),
        ("2:3:5", "4:6:10", "2:3:5"),
        ("2:3:5", "2:5:3", "not proportional"),
        ("x \\equiv 3 \\pmod{7}", "4 \\pmod{7}", "x \\equiv 4 \\pmod{7}"),
    ],
)
def test_an_answer_in_the_form_of_the_gold_answer(gold: str, found: str, expected: str) -> None:
    assert in_form_of(gold, found) == expected


@pytest.mark.parametrize(
    ("gold", "found", "same"),
    [
        ("-t \\ln x", "t \\ln(1/x)", True),
        ("-t \\ln x", "t \\ln x", False),
        ("2\\ln x", "\\ln x^2", True),
        ("\\frac{e^{2it}}{2+2i}", "\\frac{1-i}{4}e^{2it}", True),
        ("\\frac{e^{2it}}{2+2i}", "\\frac{1+i}{4}e^{2it}", False),
        ("C_1 e^{2x} + C_2 e^{-x}", "Ae^{-x}+Be^{2x}", True),
        ("C_1 e^{2x} + C_2 e^{-x}", "Ae^{-x}+Be^{x}", False),
        ("A + B^2", "B + A^2", False),
        ("x^2", "x|x|", False),
        ("\\sin x", "\\sin |x|", False),
    ],
)
def test_expressions_agree_wherever_the_gold_answer_is_real(
    gold: str, found: str, same: bool
) -> None:
    assert math_verify([""], [f"\\boxed{{{found}}}"], [gold])[0][0] == float(same)


def test_none_is_zero_only_where_the_question_asks_how_many() -> None:
    rewards = [
        math_verify([prompt], ["\\boxed{\\text{none}}"], ["0"])[0]
        for prompt in ("How many roots has it?", "Find the root x.")
    ]
    assert rewards == [(1.0, "ok"), (0.0, "wrong")]


@pytest.mark.parametrize("text", ["3\u20135", "1 2 3", "1,000 000", "4\u00b2", "E_1"])
def test_what_says_something_else_is_not_rewritten_into_a_number(text: str) -> None:
    assert quantity(latex(text)) is None or text == "4\u00b2"
    assert quantity(latex("4\u00b2")) == (16, "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("twenty-one", "21"),
        ("one thousand two hundred and five", "1205"),
        ("a hundred", "100"),
        ("three fourths", "\\frac{3}{4}"),
        ("two halves", "\\frac{2}{2}"),
        ("twelve apples", "12 apples"),
        ("minus two", "-2"),
        ("three dozen", "36"),
        ("seven and a half", "7 and \\frac{1}{2}"),
    ],
)
def test_numbers_in_words(text: str, expected: str) -> None:
    assert in_digits(text) == expected


@pytest.mark.parametrize(
    "text", ["seven eight", "twenty twenty", "a dog", "hundred", "seventh", "seven, eight", ""]
)
def test_what_is_no_single_number_in_words(text: str) -> None:
    assert in_digits(text) == text


def test_digits_that_spaces_keep_apart_are_no_number() -> None:
    assert not same_text("4" + " " * 60_000 + "2", "42") and same_text("x  + 1", "x+1")
