"""Verdicts on what models and data sets write, beside those of math-verify alone.

`honest_pairs.jsonl` has a gold answer, a completion, whether it is right, and why math-verify says
otherwise where it does.
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from exgrpo_fast.rewards.verifiers.mathematics import math_verify
from exgrpo_fast.rewards.verifiers.notation import as_union, latex, same_text
from exgrpo_fast.rewards.verifiers.number_words import in_digits
from exgrpo_fast.rewards.verifiers.quantities import in_unit_of, quantity, rational

PAIRS = [
    json.loads(line)
    for line in (Path(__file__).parent / "honest_pairs.jsonl").read_text().splitlines()
]


def verdicts(pairs: list[dict[str, Any]]) -> list[bool]:
    columns = {name: [pair[name] for pair in pairs] for name in ("gold", "completion")}
    scored = math_verify([""] * len(pairs), columns["completion"], columns["gold"])
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
        ("2 kg", "500 g", None),
        ("330 min", "5 hours 30 minutes", "330"),
        ("5 hours 30 minutes", "330 min", "11/2"),
        ("12 in", "12 inches", "12"),
        ("7", "7 cm", "7"),
        ("7 apples", "7 pears", "7"),
        ("7 cm", "7 hours", None),
        ("7 cm", "7 in", None),
    ],
)
def test_a_quantity_in_the_gold_unit(gold: str, found: str, value: str | None) -> None:
    of_gold, of_found = quantity(latex(gold)), quantity(latex(found))
    assert of_gold and of_found
    assert in_unit_of(of_gold, of_found) == (value and Fraction(value))


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("5 \\text{ hours and } 30 \\text{ minutes}", "11/2", "hours minutes"),
        ("6 ft, 3 in", "25/4", "ft in"),
        ("1 day 2 hours 3 min", "1563/1440", "day hours min"),
    ],
)
def test_quantities_in_several_units(text: str, value: str, unit: str) -> None:
    assert quantity(latex(text)) == (Fraction(value), unit)


@pytest.mark.parametrize("text", ["5 minutes 3 hours", "5 hours 3 cm", "5 h 3 h", "5 cats 3 dogs"])
def test_what_is_no_quantity_in_several_units(text: str) -> None:
    assert quantity(latex(text)) is None


def test_alternatives_of_half_lines_are_a_union() -> None:
    assert as_union("x<2 \\text{ or } x \\geq 3") == "(-\\infty, 2) \\cup [3, \\infty)"
    for other in ("x<2", "x<2 \\text{ and } x>3", "1<x<2 \\text{ or } x>3", "42 or 41"):
        assert as_union(other) == other


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
