"""The reward `math_verify`: is an answer mathematically equal to the gold answer?

Cheap comparisons come first: equal text, plain numbers, numerals with a base. What is left goes to
the package math-verify, unless `refusals.py` knows better; it is loaded only when it is asked for.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import random
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

from exgrpo_fast.rewards.judgement import CORRECT, NO_ANSWER, WRONG, Judgement, RewardError
from exgrpo_fast.rewards.verifiers import extraction
from exgrpo_fast.rewards.verifiers.choices import chooses
from exgrpo_fast.rewards.verifiers.gold_form import in_form_of
from exgrpo_fast.rewards.verifiers.intervals import as_intervals
from exgrpo_fast.rewards.verifiers.notation import latex
from exgrpo_fast.rewards.verifiers.numerals import number, plain_form
from exgrpo_fast.rewards.verifiers.quantities import converted, in_unit_of, quantity
from exgrpo_fast.rewards.verifiers.refusals import numeric_sides, says_several_things, too_large
from exgrpo_fast.rewards.verifiers.words import same_text


def math_verify(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[Any], **columns: Any
) -> list[Judgement]:
    r"""1.0 where the final answer is mathematically equal to the gold answer.

    Only the last balanced `\boxed{...}` is read; without a box, `#### x` or `<answer>x</answer>`.
    Other reasons: `no_answer`, `wrong`, `unit` (the gold answer has a percent sign and this one has
    none), and `refused:...` for what is too large to evaluate or says several things at once.
    """
    return [
        _math_verify(text, extraction.gold_text(gold), prompt)
        for prompt, text, gold in zip(prompts, completions, answer, strict=True)
    ]


# An honest answer costs at most 0.35 s of a core; hostile ones cost all they are given.
MATH_SECONDS = 1.5
MATH_CPU_SECONDS = 0.8


def _math_verify(completion: str, gold: str, prompt: str) -> Judgement:
    found = extraction.final_answer(completion)
    if found is None:
        return NO_ANSWER
    if (verdict := _of_numbers(found, gold)) is not None:
        return verdict
    found = _without_lead_in(found)
    if plain_form(found) == plain_form(gold) or chooses(found, gold):
        return CORRECT
    found, gold = latex(found), as_intervals(latex(gold))
    if (interval := as_intervals(found)) != found and not _MAY_BE_INTERVAL.search(gold):
        return WRONG  # `5 < x < 7` for `5, 7`
    found = interval
    found = in_form_of(gold, found)
    if same_text(found, gold) or _says_none(found, gold, prompt):
        return CORRECT
    return (
        _of_numbers(found, gold)
        or _of_numerals(found, gold)
        or _refused(too_large(found))
        or _by_value(found, gold)
        or _by_sides(found, gold)
        or _refused(says_several_things(found, gold))
        or _by_mathematics(found, gold)
    )


_MAY_BE_INTERVAL = re.compile(r"[(\[<>]|\\(?:[lgn]eq|mathbb|emptyset|in|[lg]t)(?![a-zA-Z])")
_AROUND_ANSWER = re.compile(
    r"^(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final |correct )?answer(?: is|:| =):?\s*"
    r"|\.?\s*I hope it is correct\.?$",
    re.IGNORECASE,
)


def _without_lead_in(found: str) -> str:
    """`The final answer is $12$. I hope it is correct.` as `12`."""
    plain = plain_form(found)
    stated = _AROUND_ANSWER.sub("", plain)
    return found if stated == plain else stated


def _says_none(found: str, gold: str, prompt: str) -> bool:
    """`none` for 0 where the question asks how many; of an unknown it says that there is none."""
    return gold == "0" and found == r"\emptyset" and bool(_HOW_MANY.search(prompt))


_HOW_MANY = re.compile(r"\bhow many\b|\bnumber of\b", re.IGNORECASE)


def _refused(why: str | None) -> Judgement | None:
    return None if why is None else (0.0, f"refused:{why}")


def _by_value(found: str, gold: str) -> Judgement | None:
    """Exactly, where both are rational numbers, whatever their units; None for anything else."""
    of_found, of_gold = quantity(found), quantity(gold)
    if of_found is None or of_gold is None:
        return None
    if of_gold.unit == "%" != of_found.unit:  # `0.25` is 25 %, `25` is not
        return CORRECT if of_found.value == of_gold.value / 100 else (0.0, "unit")
    value = in_unit_of(of_gold, of_found)
    if value is None:
        return WRONG
    if _same_number(value, of_gold.value):
        return CORRECT
    as_share = of_found.unit == "%" != of_gold.unit and of_found.value / 100 == of_gold.value
    return CORRECT if as_share else WRONG


def _by_sides(found: str, gold: str) -> Judgement | None:
    """A calculation with its result, where every side of it is the answer; None for anything else."""
    sides = numeric_sides(found)
    if not sides or numeric_sides(gold):
        return None
    verdicts = (_by_value(side, gold) or _by_mathematics(side, gold) for side in sides)
    return CORRECT if all(verdict == CORRECT for verdict in verdicts) else None


def _by_mathematics(found: str, gold: str) -> Judgement:
    if _has_percent(gold) and not _has_percent(found):
        return 0.0, "unit"
    if _CAPITALS.fullmatch(gold) and _CAPITALS.fullmatch(found):  # an order, not a product
        return WRONG
    if (in_gold_unit := converted(found, gold)) is None:
        return WRONG
    gold, found = _both_signs(gold), _both_signs(in_gold_unit)
    return CORRECT if _equal(_parse_gold(gold), _parse(found)) else WRONG


def _both_signs(text: str) -> str:
    r"""`x = \frac{3 \pm \sqrt{5}}{2}` as the list of its two values."""
    if r"\pm" not in text or "," in text and "(" in text:
        return text
    inner = _SET.sub(r"\1", _LEFT_SIDE.sub("", text)).split(",")
    upper = [part.replace(r"\pm", "+").replace(r"\mp", "-") for part in inner]
    lower = [part.replace(r"\pm", "-").replace(r"\mp", "+") for part in inner]
    return ", ".join(dict.fromkeys(upper + lower))


_LEFT_SIDE = re.compile(r"^[a-z](?:_\{[\d,]*\}|_\d)?\s*(?:=|\\in)\s*(?=[^=]+$)")
_SET = re.compile(r"^\\\{(.*)\\\}$")
_CAPITALS = re.compile(r"[A-Z]{2,}")


def _math_verify_gold(gold: str, columns: Mapping[str, Any]) -> Judgement:
    """A gold answer against itself, without the shortcuts that would accept any text."""
    gold = extraction.gold_text(gold)
    boxed = extraction.last_box(f"\\boxed{{{gold}}}")
    if boxed is None or extraction.clean(boxed) != gold:
        return 0.0, "unbalanced"
    gold = latex(gold)
    if quantity(gold) is not None:
        return CORRECT
    parsed = _parse(gold)
    if all(isinstance(part, str) for part in parsed):
        return 0.0, "unparsable"  # only the very same text will be accepted
    return CORRECT if _equal(_parse_gold(gold), parsed) else (0.0, "not_equal_to_itself")


def _of_numbers(found: str, gold: str) -> Judgement | None:
    value, gold_value = number(found), number(gold)
    if value is None or gold_value is None:
        return None
    return CORRECT if _same_number(value, gold_value) else WRONG


def _of_numerals(found: str, gold: str) -> Judgement | None:
    """Numerals with a base; None for anything else."""
    base, gold_base = _BASE.fullmatch(found.upper()), _BASE.fullmatch(gold.upper())
    if base and gold_base:  # math-verify drops the base
        return CORRECT if base.groups() == gold_base.groups() else WRONG
    if gold_base and found.upper() == gold_base[1]:
        return CORRECT
    if base and base[1] == gold.upper() and base[2] == "16" and gold.isalnum():
        return CORRECT if number(gold) is None else WRONG
    if base and number(gold) is not None and not _possible_numeral(*base.groups()):
        return WRONG
    return None


_BASE = re.compile(r"(\d[\dA-F]*|[A-F]{2,})_\{?(\d{1,2})\}?", re.ASCII)


def _possible_numeral(digits: str, base: str) -> bool:
    return 2 <= int(base) <= 16 and all(int(digit, 16) < int(base) for digit in digits)


def _same_number(value: Fraction, gold: Fraction) -> bool:
    if value == gold:
        return True
    # A decimal gold is rounded somewhere, but not before its last place; an integer is not.
    # math-verify rounds to six places, which calls every number below 5e-7 zero.
    if gold.denominator == 1:
        return False
    places = next((d for d in range(1, 20) if 10**d % gold.denominator == 0), 0)
    allowed = min(abs(gold) / 10**6, Fraction(1, 2 * 10**places))
    return abs(value - gold) <= allowed


def _has_percent(text: str) -> bool:
    return "%" in text or re.search(r"\b(?:per ?cent|pct)\b", text) is not None


# What math-verify 0.9.0 cannot read although it is plain mathematics.
_REWRITES: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"(?<=\d)\.(?=\s*(?:[/)},]|$))"), ""),  # 3./2
    (re.compile(r"(?<![A-Za-z\\])E_"), r"\\Xi_"),  # E alone is Euler's number, even with an index
    # Behind a number it takes letters for a unit, and drops them: `2ab` would be 2.
    (re.compile(r"(?<=[\d}])([a-zA-Z]{1,3})$"), lambda m: _factors(m[1])),
    (re.compile(r"(\\cdot|\\times)\s*([a-zA-Z]{1,2})$"), r"\1 {\2}"),
    (re.compile(r"_\{\\odot\s*\}"), "_{o}"),
    (re.compile(r"_\{\\(max|min)\s*\}"), r"_{\1}"),
    (  # it drops the sign of degrees: sin 60° would be that of 60 radians
        re.compile(
            r"(\\(?:sin|cos|tan|cot|sec|csc)\s*)[({]?\s*(\d+(?:\.\d+)?)\s*\^\s*\{?\s*\\circ\s*\}?\s*[)}]?"
        ),
        r"\1{(\\frac{\2\\pi}{180})}",
    ),
    (re.compile(r"(\\(?:sin|cos|tan|ln|log))\s*([a-z])\s*(?=\\cdot|\\times)"), r"(\1(\2))"),
    (re.compile(r"\bnp\.(arcsin|arccos|arctan|sin|cos|tan|exp|log|pi)\b"), r"\\\1"),
]


_UNITS = ("mm", "cm", "dm", "km", "kg", "mg", "ml", "mL", "ft", "lb", "lbs")


def _factors(letters: str) -> str:
    if letters == "i" or letters in _UNITS:
        return letters
    return "".join(f" \\cdot {{{letter}}}" for letter in letters)


def _parse(text: str) -> list[Any]:
    """Text -> what math-verify makes of it; only strings in it when it cannot be parsed."""
    verifier, target = _math_verifier()
    text = plain_form(text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return verifier.parse(f"\\boxed{{{text}}}", [target], parsing_timeout=None)


_parse_gold = lru_cache(maxsize=16_384)(_parse)


def _equal(gold: list[Any], found: list[Any]) -> bool:
    # No limits of math-verify's own: they clear the worker's timer, and count whole seconds.
    # An interval and the inequality that says the same are equal.
    options = {"timeout_seconds": None, "allow_set_relation_comp": True}
    verify = _math_verifier()[0].verify
    equal = bool(verify(gold, found, **options))
    if not equal and _is_complex(gold) | _is_complex(found):
        equal = bool(verify(_complex(gold), _complex(found), **options))
    equal = equal or _agree_at_points(gold, found)
    return equal and not _differ_though_tiny(gold, found)


def _is_complex(parsed: list[Any]) -> bool:
    """Whether `i`, which math-verify takes for a variable, is the only one."""
    value = parsed[0] if parsed else None  # nothing is left of a comma
    return {str(symbol) for symbol in getattr(value, "free_symbols", ())} == {"i"}


def _complex(parsed: list[Any]) -> list[Any]:
    """With the imaginary unit for `i`, in real and imaginary part."""
    if not _is_complex(parsed) or not hasattr(parsed[0], "expand"):
        return parsed
    value = parsed[0]
    (symbol,) = value.free_symbols
    unit = importlib.import_module("sympy").I
    return [value.subs(symbol, unit).doit().expand(complex=True), *parsed[1:]]


def _agree_at_points(gold: list[Any], found: list[Any]) -> bool:
    """Whether two expressions of the same variables agree wherever the gold answer is real.

    At random points, four of them: an identity is found that sympy does not prove, such as
    ln(1/x) = -ln x. With `i` in it an expression need not be real.
    """
    sympy = importlib.import_module("sympy")
    one: Any = gold[0] if gold else None
    other: Any = found[0] if found else None
    if not (isinstance(one, sympy.Expr) and isinstance(other, sympy.Expr)):
        return False
    names, of_found = (sorted(map(str, each.free_symbols)) for each in (one, other))
    constants = [name for name in names if _CONSTANT.fullmatch(name)]
    if names != of_found and one.has(sympy.pi) and set(names + of_found) <= {"k", "m", "n"}:
        constants = names  # any integer
    renamed = [name for name in of_found if name not in names or name in constants]
    if not names or len(names) != len(of_found) or not len(constants) == len(renamed) < 4:
        return False
    return any(
        _agree(one, other, dict(zip(renamed, order, strict=True)))
        for order in itertools.permutations(constants)
    )


_CONSTANT = re.compile(r"[Cc]_\{?\d\}?")  # of integration: `A` and `B` will do for them


def _agree(gold: Any, found: Any, renamed: Mapping[str, str]) -> bool:
    unit = importlib.import_module("sympy").I
    names = sorted(map(str, gold.free_symbols))
    chosen, agreed = random.Random(0), 0
    for attempt in range(16):
        point = {name: chosen.uniform(0.3, 1.9) for name in names}
        if attempt < 8:  # the first is negative throughout: x is not |x|
            signs = (-1, 1) if attempt else (-1,)
            point = {name: chosen.choice(signs) * value for name, value in point.items()}
        if "i" in point:
            point["i"] = unit
        places = {s: point[renamed.get(str(s), str(s))] for s in found.free_symbols}
        try:
            value = complex(gold.subs({s: point[str(s)] for s in gold.free_symbols}).evalf())
            difference = abs(value - complex(found.subs(places).evalf()))
        except (TypeError, ValueError, OverflowError, ZeroDivisionError):
            continue
        if "i" not in point and abs(value.imag) > 1e-12 * abs(value):
            continue
        if not difference <= 1e-9 * abs(value):
            return False
        agreed += 1
        if agreed == 4:
            return True
    return False


def _differ_though_tiny(gold: list[Any], found: list[Any]) -> bool:
    """Whether two numbers below 1e-3 are apart: math-verify compares their first six decimals."""
    numbers = [p[0] for p in (gold, found) if p and getattr(p[0], "is_number", False)]
    if len(numbers) < 2:
        return False
    one, other = (number.doit() for number in numbers)  # a percent sign is left unevaluated
    try:
        value, difference = abs(complex(one)), abs(complex(one - other))
    except TypeError:  # infinite, or nothing that has a value
        return False
    return value < 1e-3 and difference > 1e-6 * value


@lru_cache(maxsize=1)
def _math_verifier() -> tuple[Any, Any]:
    # Both packages log every formula they cannot parse; a policy writes thousands of them.
    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    module = importlib.import_module("math_verify")
    return module, module.LatexExtractionConfig(boxed_match_priority=0)


def _load_math_verify() -> None:
    try:
        _math_verifier()
    except ImportError:
        raise RewardError(
            "the reward 'math_verify' needs the package math-verify: "
            "pip install 'exgrpo-fast[train]'"
        ) from None
    _equal(_parse_gold("\\frac{1}{2}"), _parse("0.5"))  # builds the parser's tables


math_verify.check_gold = _math_verify_gold  # pyright: ignore[reportFunctionMemberAccess]
math_verify.warm_up = _load_math_verify  # pyright: ignore[reportFunctionMemberAccess]
math_verify.max_seconds = MATH_SECONDS  # pyright: ignore[reportFunctionMemberAccess]
math_verify.max_cpu_seconds = MATH_CPU_SECONDS  # pyright: ignore[reportFunctionMemberAccess]
