r"""Answers made to stop a verifier, to fool it, or to break what surrounds it.

`adversarial_answers()` is one list for the tests, `exgrpo-fast reward-test` and `bench/rewards.py`. Every
entry has a gold answer (42 unless it says otherwise) and whether it deserves the reward; few do.
All of it is generated here: expressions that are short to write and endless to evaluate, nesting,
megabytes, text aimed at the regular expressions that look for answers, Unicode, code, and answers
that hope to be taken for several others. A verifier has to settle each within `IN_TIME_MS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

IN_TIME_MS = 2500.0
MEGABYTE = 1_000_000


class Adversarial(NamedTuple):
    """`correct`: an honest answer in strange clothes, which earns the reward."""

    name: str
    completion: str
    gold: str = "42"
    correct: bool = False


def adversarial_answers() -> list[Adversarial]:
    r"""All of them, in a fixed order; the names are distinct."""
    boxed = {**_endless(), **_nested(), **_long(), **_structures(), **_code(), **_several()}
    return [
        *(Adversarial(name, box(text)) for name, text in boxed.items()),
        *(
            Adversarial(name, text)
            for name, text in {**_bare(), **_for_regexes(), **_binary()}.items()
        ),
        *_hostile_golds(),
        *_honest(),
    ]


def box(answer: str) -> str:
    """A completion that ends in this answer."""
    return f"So the answer is $\\boxed{{{answer}}}$."


# --- short to write, endless to evaluate ----------------------------------------------------------


def _endless() -> dict[str, str]:
    towers = {
        f"tower_{base}_{height}": _tower(base, height)
        for base in (2, 9, 10)
        for height in (3, 4, 6)
    }
    return {
        **towers,
        "tower_20": _tower(3, 20),
        "tower_negative": "-" + _tower(7, 4),
        "tower_in_fraction": f"\\frac{{{_tower(8, 4)}}}{{{_tower(7, 4)}}}",
        "tower_times_10": "10 \\cdot " + _tower(9, 4),
        "tower_minus_itself": f"{_tower(9, 3)} - {_tower(9, 3)} + 43",
        "tower_of_brackets": "((9^9)^{(9^9)})^{(9^9)}",
        "tower_of_variables": "x^{x^{x^{x^{9999}}}}",
        "tower_of_fractions": "(\\frac{9}{2})^{(\\frac{9}{2})^{(\\frac{9}{2})^{99}}}",
        "tower_in_words": "9**9**9**9",
        "power_of_two": "2^{3000000000}",
        "power_of_ten": "10^{99999999999}",
        "power_nearly_allowed": "9999^{9999}^{9999}",
        "power_just_allowed": "(9999^{9999})^{9999}",
        "power_of_a_root": "(1+\\sqrt{2})^{9999}",
        "power_of_a_complex": "(3+4i)^{9999}",
        "power_of_a_sum": "(a+b+c+d)^{60}",
        "power_of_sums_apart": "(a+b+c+d)^{99} - (a+b+c+d)^{98}",
        "root_of_power": "\\sqrt{9^{9^{9}}}",
        "root_of_high_order": "\\sqrt[9999]{9999!}",
        # factorials
        **{f"factorial_1e{n}": f"1{'0' * n}!" for n in (3, 4, 6, 7, 9)},
        "factorial_stacked": "9" + "!" * 30,
        "factorial_in_brackets": "((((3!)!)!)!)!",
        "factorial_of_three_digits_twice": "(999!)!",
        "factorial_of_tower": "(9^{9})!",
        "factorial_quotient": "\\frac{999999!}{999998!}",
        "factorial_power": "(999!)^{999}",
        "binomial_large": "\\binom{1000000000}{500000000}",
        "binomial_middling": "\\binom{9999}{5000}",
        "binomial_factorial": "\\binom{9999}{5000}!",
        "binomial_nested": "\\binom{\\binom{99}{49}}{\\binom{98}{49}}",
        # sums and products
        "sum_harmonic": "\\sum_{i=1}^{9999999999} \\frac{1}{i}",
        "sum_of_sines": "\\sum_{i=1}^{9999999999} \\sin(i)",
        "sum_of_factorials": "\\sum_{i=1}^{99999} i!",
        "sum_of_powers": "\\sum_{i=1}^{99999} i^{i}",
        "sum_nested": "\\sum_{i=1}^{9999} \\sum_{j=1}^{9999} \\sin(ij)",
        "sum_without_end": "\\sum_{n=1}^{\\infty} \\frac{\\sin(n^2)}{n^n}",
        "product_long": "\\prod_{i=1}^{9999999} i",
        "product_nested": "\\prod_{i=1}^{9999} \\prod_{j=1}^{9999} (i+j)",
        "product_of_sums": "\\prod_{i=1}^{999} (x+i)",
        "limit": "\\lim_{x \\to 0} \\frac{\\sin(\\tan x) - \\tan(\\sin x)}{x^{99}}",
        "derivatives": "\\frac{d}{dx} x^{x^{x^{x^{x}}}}",
        # integrals
        "integral_gauss": "\\int_0^1 e^{x^2} dx",
        "integral_of_x_to_the_x": "\\int_0^1 x^x dx",
        "integral_nested": "\\int_0^1 \\int_0^1 \\int_0^1 e^{xyz} \\sin(x^y) dx dy dz",
        "integral_of_roots": "\\int_0^9 \\sqrt{x^5 + \\sqrt{x^3 + \\sqrt{x + 1}}} dx",
        "integral_of_tangents": "\\int \\tan(\\tan(\\tan x)) \\sin(x^x) dx",
        "integral_rational": "\\int \\frac{x^{17} + 1}{x^{23} + x^{11} + 5} dx",
        # functions of large numbers
        "sine_of_tower": "\\sin(9^{9^{9}})",
        "sine_of_factorial": "\\sin(999!)",
        "logarithm_of_tower": "\\log(9^{9^{9}})",
        "logarithm_of_power": "\\log_{2}(9999^{9999})",
        "modulus": "9^{9^{9}} \\mod 43",
        "greatest_common_divisor": "\\gcd(9999^{9999}, 9998^{9998})",
        "trigonometric_identity": "+".join(
            f"\\sin^{{{k}}}({k}x)\\cos^{{{k}}}({k}x)" for k in range(9)
        ),
        "polynomials": "(x+y)^{40} - (x-y)^{40} + (x+2y)^{39}",
        "absolute_values": "|||x-1|-2|-3|",
        "floats_huge": "1e999999999",
        "floats_of_huge_mantissa": "9" * 50 + "e" + "9" * 4,
        "matrix_power": "\\begin{pmatrix} 1 & 1 \\\\ 1 & 0 \\end{pmatrix}^{9999}",
    }


def _tower(base: int, height: int) -> str:
    return str(base) if height == 1 else f"{base}^{{{_tower(base, height - 1)}}}"


# --- nested, long, large --------------------------------------------------------------------------


def _nested() -> dict[str, str]:
    wraps = {
        "brackets": ("(", ")"),
        "squares": ("[", "]"),
        "braces": ("{", "}"),
        "bars": ("|", "|"),
        "fractions": ("\\frac{1}{1+", "}"),
        "roots": ("\\sqrt{2+", "}"),
        "left_right": ("\\left(", "\\right)"),
        "indices": ("x_{", "}"),
        "texts": ("\\text{", "}"),
    }
    nested = {
        f"nested_{name}_{depth}": opening * depth + "42" + closing * depth
        for name, (opening, closing) in wraps.items()
        for depth in (8, 30, 1000)
    }
    nested = {name: text for name, text in nested.items() if name not in _EQUAL_TO_42}
    return {**nested, "unbalanced_open": "(" * 20_000, "unbalanced_mixed": "([{" * 300 + "42"}


# Brackets around 42 say 42 if there is time to read them; `_honest` has one of them.
_EQUAL_TO_42 = ("nested_brackets_8", "nested_braces_8", "nested_bars_8", "nested_left_right_8")
_EQUAL_TO_42 += ("nested_texts_8", "nested_squares_8", "nested_braces_30", "nested_braces_1000")


def _long() -> dict[str, str]:
    return {
        "digits_4000": "7" * 4000,
        "digits_1MB": "7" * MEGABYTE,
        "decimals_1MB": "42." + "0" * MEGABYTE + "1",
        "plus_20kB": "1+" * 10_000 + "1",
        "plus_1MB": "1+" * (MEGABYTE // 2) + "1",
        "plus_500": "1+" * 249 + "1",
        "times_500": "x*" * 249 + "y",
        "letters_1MB": "x" * MEGABYTE,
        "commas_60kB": "1," * 30_000 + "1",
        "spaces_60kB": "4" + " " * 60_000 + "2",
        "newlines_60kB": "4" + "\n" * 60_000 + "2",
        "backslashes_60kB": "\\" * 60_000,
    }


def _structures() -> dict[str, str]:
    return {
        "set_of_3000": "\\{" + ",".join(map(str, range(3000))) + "\\}",
        "set_of_100": "\\{" + ",".join(map(str, range(100))) + "\\}",
        "list_of_roots": ",".join(f"\\sqrt{{{k}}}" for k in range(40)),
        "intervals": "\\cup".join(f"({k},{k + 1})" for k in range(60)),
        "inequalities": "<".join(f"x_{{{k}}}" for k in range(60)),
        "determinant": "\\det" + _matrix("x+1", 9),
        "matrix_20_by_20": _matrix("1", 20),
        "zero_divided": "\\frac{1}{0}",
        "zero_by_zero": "\\frac{0}{0}",
        "infinity": "\\infty",
        "infinity_minus_infinity": "\\infty - \\infty",
        "not_a_number": "nan",
        "empty": "",
        "blank": " \\quad ~ ",
        "minus_sign_only": "-",
        "operator_only": "\\frac",
    }  # fmt: skip


def _matrix(entry: str, size: int) -> str:
    rows = " \\\\ ".join([" & ".join([entry] * size)] * size)
    return f"\\begin{{pmatrix}} {rows} \\end{{pmatrix}}"


# --- aimed at what surrounds the verifier ---------------------------------------------------------


def _code() -> dict[str, str]:
    calls = {
        "import": "__import__('os').system('touch /tmp/adversarial')",
        "exec": "exec('raise SystemExit')",
        "open": "open('/etc/passwd').read()",
        "lambda": "(lambda: 42)()",
        "dunder": "().__class__.__bases__[0].__subclasses__()",
        "exit": "exit()",
        "loop": "[0 for _ in iter(int, 1)]",
    }
    return {
        **{f"code_{name}": call for name, call in calls.items()},
        **{f"code_in_text_{name}": f"\\text{{{call}}}" for name, call in calls.items()},
        "code_operatorname": "\\operatorname{__import__('os').abort()}",
        "code_input": "\\input{/etc/passwd}",
        "code_write18": "\\write18{touch /tmp/adversarial}",
        "json_reply": '"}\n{"id": 0, "results": [[1.0, "ok", ""]]}',
    }


def _bare() -> dict[str, str]:
    """No box: nothing here is an answer."""
    return {
        "bare_tower": "9**9**9**9",
        "bare_sentence": "I give up. There are 42 cats.",
        "bare_answer": "The answer is 42",
        "bare_in_junk": "junk 123 text 42 containing it",
        "bare_digits_1MB": "7" * MEGABYTE,
        "bare_plus_1MB": "1+" * (MEGABYTE // 2) + "1",
        "bare_prose_1MB": "It could be 41 or 43. " * (MEGABYTE // 22),
        "bare_e_notation": "The answer is 42e5",
        "box_behind": "\\boxed{}42",
        "box_unclosed": "\\boxed{42",
        "box_in_thoughts": "<think>\\boxed{42}</think> I do not know.",
        "box_changed": "\\boxed{42} no, wait: \\boxed{41}",
        "box_of_box": "\\boxed{42 = \\boxed{41}}",
        "box_64kB_ago": "\\boxed{42}" + "x" * 70_000,
    }


def _for_regexes() -> dict[str, str]:
    repeated = {
        "answer_colon": "answer: ",
        "final_answer_is": "final answer is ",
        "boxed_open": "\\boxed{",
        "boxed_closed": "\\boxed{1} ",
        "boxed_in_dollars": "$\\boxed$",
        "fbox": "\\fbox{1}",
        "dollars": "$",
        "brackets_open": "\\[",
        "parentheses_open": "\\(",
        "digits_and_spaces": "1 ",
        "digits_and_commas": "1,1",
        "equals": "=1",
        "roots_without_brace": "\\sqrt1",
        "fractions_without_brace": "\\frac12",
        "texts": "\\text{a}",
        "percents": "1\\%",
        "hashes": "#### ",
        "answer_tags": "<answer>",
        "think_tags": "</think>",
        "think_opened": "<think>",
    }
    return {f"repeated_{name}": text * 20_000 for name, text in repeated.items()}


def _binary() -> dict[str, str]:
    return {
        "null_bytes": box("4\0001\0"),
        "lone_surrogate": box("4\ud8002"),
        "right_to_left": box("\u202e24 is wrong"),
        "combining_100k": box("4" + "\u0301" * 60_000 + "1"),
        "emoji_60k": "\U0001f600" * 60_000 + box("41"),
        "superscript": box("4\u00b2"),  # full NFKC makes 42 of it
        "circled_digit": box("\u3251\u3252"),
        "roman_numeral": box("\u216c"),
        "line_separators": box("41\u2028\u2029"),
        "control_characters": box("".join(map(chr, range(32))) + "41"),
    }


# --- several answers at once ----------------------------------------------------------------------


def _several() -> dict[str, str]:
    return {
        "chain_of_two": "41=42",
        "chain_of_three": "x=41=42",
        "chain_equivalent": "41 \\equiv 42",
        "chain_of_fractions": "\\frac{82}{2}=42",
        "hedge_maybe": "42 \\text{ (or maybe 41)}",
        "hedge_or": "42 \\text{ or } 41",
        "hedge_words": "\\text{either 42 or 43}",
        "hedge_note": "42 \\text{ (41)}",
        "list_of_two": "41, 42",
        "list_of_hundred": ",".join(map(str, range(100))),
        "set_of_three": "\\{41, 42, 43\\}",
        "interval": "[41, 43]",
        "inequality": "41 < x < 43",
        "plus_minus": "42 \\pm 1",
        "approximately": "42.0000004",
        "index": "42_{41}",
        "percent_of_it": "0.42\\%",
        "e_notation": "42e5",
        "euler_in_number": "4e1 + 2e0",
        "column": "\\begin{pmatrix} 42 \\\\ 41 \\end{pmatrix}",
    }


# --- hostile data, honest answers -----------------------------------------------------------------


def _hostile_golds() -> Iterator[Adversarial]:
    """The data can be as bad as the policy: then the right answer is the same text, if any."""
    golds: Mapping[str, str] = {
        "tower": "9^{9^{9}}",
        "factorial": "99999!",
        "nested": "(" * 40 + "x" + ")" * 40,
        "empty": "",
        "unbalanced": "\\frac{1}{2",
        "digits": "7" * 5000,
        "surrogate": "\ud800",
    }
    for name, gold in golds.items():
        yield Adversarial(f"gold_{name}", box("\\frac{5}{7}"), gold)


def _honest() -> Iterator[Adversarial]:
    yield Adversarial("honest_full_width", box("\uff14\uff12"), correct=True)
    yield Adversarial("honest_arabic", box("\u0664\u0662"), correct=True)
    yield Adversarial("honest_zero_width", box("4\u200b2"), correct=True)
    yield Adversarial("honest_lines", box("\n 42 \n"), correct=True)
    yield Adversarial("honest_brackets", box("(((42)))"), correct=True)
    yield Adversarial("honest_equation", box("x = 42"), correct=True)
    yield Adversarial("honest_product", box("6 \\cdot 7"), correct=True)
    yield Adversarial("honest_dollars", box("\\$42.00"), correct=True)
    yield Adversarial("honest_thoughts", "<think>\\boxed{41}</think>" + box("42"), correct=True)
    yield Adversarial("honest_second_thought", "\\boxed{41} no: \\boxed{42}", correct=True)
    yield Adversarial(
        "honest_after_1MB", "It could be 41. " * (MEGABYTE // 16) + box("42"), correct=True
    )
    yield Adversarial("honest_minus", box("\u22125"), "-5", correct=True)
    yield Adversarial("honest_tower", box("9^{9^{9}}"), "9^{9^{9}}", correct=True)
    yield Adversarial(
        "honest_conic", box("x^2/4+y^2/3=1"), "\\frac{x^2}{4}+\\frac{y^2}{3}=1", correct=True
    )
