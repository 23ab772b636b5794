r"""Reward functions: the built-in ones, and how a name or a reference becomes a function.

Every reward has TRL's signature, so a function written for TRL runs as it is:

    def my_reward(prompts: list[str], completions: list[str], **columns: list) -> list[float | None]

`columns` holds `answer` and every other field of the data row, one entry per completion. Prompts
and completions are plain strings (the rendered chat template and the raw text), never message
lists. The pool calls a function with lists of length 1. None means: this function has no opinion
on this sample.

Two conventions go beyond TRL's, and both are optional:
  - an entry may be `(reward, reason)`; `reason` is a short word that is counted in the metrics
  - `my_reward.check_gold(answer, columns) -> (reward, reason)` says whether a gold answer is of
    use; it is called for every question before training

This file is imported by the reward workers: it loads no torch, and math-verify and reasoning-gym
only when they are asked for.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import json
import logging
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from exgrpo_fast.errors import UserError
from exgrpo_fast.rewards import extraction

RewardFunction = Callable[..., Any]
Judgement = tuple[float, str]  # reward and reason

RIGHT: Judgement = (1.0, "ok")
WRONG: Judgement = (0.0, "wrong")
NO_ANSWER: Judgement = (0.0, "no_answer")


class RewardError(UserError):
    """A reward that cannot be used, as one line for the user."""


# --- exact ----------------------------------------------------------------------------------------


def exact(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns: Any
) -> list[Judgement]:
    """1.0 where the final answer is the gold answer, character by character after cleaning.

    A completion without a box, `####` or `<answer>` is taken as a whole.
    """
    return [_exact(text, gold) for text, gold in zip(completions, answer, strict=True)]


def _exact(completion: str, gold: str) -> Judgement:
    found = extraction.final_answer(completion)
    if found is None:
        found = extraction.clean(extraction.visible_part(completion))
    return RIGHT if plain_form(found) == plain_form(gold) else WRONG


def _exact_gold(gold: str, columns: Mapping[str, Any]) -> Judgement:
    return RIGHT if plain_form(gold) else (0.0, "empty")


# --- gsm8k ----------------------------------------------------------------------------------------


def gsm8k(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns: Any
) -> list[Judgement]:
    """1.0 where the number after the last `####` (else in the last box or tag) is the gold number.

    Commas, a dollar sign, a percent sign and a unit behind the number are ignored.
    """
    return [_gsm8k(text, gold) for text, gold in zip(completions, answer, strict=True)]


def _gsm8k(completion: str, gold: str) -> Judgement:
    after_hashes = extraction.last_hashes(extraction.visible_part(completion))
    found = after_hashes if after_hashes else extraction.final_answer(completion)
    value = None if found is None else _leading_number(found)
    if value is None:
        return NO_ANSWER
    return RIGHT if value == _leading_number(gold) else WRONG


def _gsm8k_gold(gold: str, columns: Mapping[str, Any]) -> Judgement:
    return (0.0, "not_a_number") if _leading_number(gold) is None else RIGHT


_LEADING_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?(?![\d,])")


def _leading_number(text: str) -> Fraction | None:
    text = re.sub(r"\\?\$|\\!|\s", "", extraction.clean(text))
    match = _LEADING_NUMBER.match(text)
    return None if match is None else number(match.group())


# --- reasoning-gym --------------------------------------------------------------------------------


def reasoning_gym(
    prompts: Sequence[str],
    completions: Sequence[str],
    answer: Sequence[str],
    reasoning_gym: Sequence[str] | None = None,
    metadata: Sequence[Any] | None = None,
    gym_options: Sequence[str] | None = None,
    **columns: Any,
) -> list[Judgement]:
    """The task's own score in [0, 1] of the final answer; columns as `data.py` makes them.

    The reason is `partial` between 0 and 1, and `no_task` for a row of another source.
    """
    rows = range(len(completions))
    return [
        _gym(
            completions[i], answer[i], _at(reasoning_gym, i), _at(metadata, i), _at(gym_options, i)
        )
        for i in rows
    ]


def _at(column: Sequence[Any] | None, row: int) -> Any:
    return None if column is None else column[row]


def _gym(completion: str, gold: str, name: str | None, metadata: Any, options: Any) -> Judgement:
    if not name:
        return 0.0, "no_task"
    found = extraction.final_answer(completion)
    return NO_ANSWER if found is None else _gym_score(found, gold, name, metadata, options)


def _gym_score(text: str, gold: str, name: str, metadata: Any, options: Any) -> Judgement:
    # `metadata` is a Python literal, because JSON would turn the tuples some scorers compare to
    # into lists. A task without a unique answer has the gold answer None, which data.py writes "".
    entry = {
        "answer": gold or None,
        "metadata": ast.literal_eval(metadata) if isinstance(metadata, str) else metadata,
    }
    score = float(_gym_task(name, options or "{}").score_answer(text, entry))
    return score, "ok" if score == 1.0 else "wrong" if score == 0.0 else "partial"


@lru_cache(maxsize=128)
def _gym_task(name: str, options: str) -> Any:
    return importlib.import_module("reasoning_gym").create_dataset(name, **json.loads(options))


def _gym_gold(gold: str, columns: Mapping[str, Any]) -> Judgement:
    name = columns.get("reasoning_gym")
    if not name:
        return 0.0, "no_task"
    if not gold:
        return 1.0, "any_answer"  # the task accepts every valid answer and names none
    return _gym_score(gold, gold, name, columns.get("metadata"), columns.get("gym_options"))


def _load_gym() -> None:
    try:
        importlib.import_module("reasoning_gym")
    except ImportError:
        raise RewardError(
            "the reward 'reasoning_gym' needs the package reasoning-gym: "
            "pip install 'exgrpo-fast[gym]'"
        ) from None


# --- math-verify ----------------------------------------------------------------------------------


def math_verify(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns: Any
) -> list[Judgement]:
    r"""1.0 where the final answer is mathematically equal to the gold answer.

    Only the last balanced `\boxed{...}` is read; without a box, `#### x` or `<answer>x</answer>`.
    Other reasons: `no_answer`, `wrong`, `unit` (the gold answer has a percent sign and this one has
    none), and `refused:...` for what is too large to evaluate or says several things at once.
    """
    return [_math_verify(text, gold) for text, gold in zip(completions, answer, strict=True)]


MATH_SECONDS = 2.0  # an honest answer costs at most 0.35 s; hostile ones cost all they are given


def _math_verify(completion: str, gold: str) -> Judgement:
    found = extraction.final_answer(completion)
    if found is None:
        return NO_ANSWER
    gold = extraction.clean(gold)
    if found == gold or plain_form(found) == plain_form(gold):
        return RIGHT
    fast = _fast_verdict(found, gold)
    if fast is not None:
        return fast
    refusal = refuse(found, gold)
    if refusal is not None:
        return 0.0, f"refused:{refusal}"
    if _has_percent(gold) and not _has_percent(found):
        return 0.0, "unit"
    return RIGHT if _equal(_parse_gold(gold), _parse(found)) else WRONG


def _math_verify_gold(gold: str, columns: Mapping[str, Any]) -> Judgement:
    """A gold answer against itself, without the shortcuts that would accept any text."""
    gold = extraction.clean(gold)
    boxed = extraction.last_box(f"\\boxed{{{gold}}}")
    if boxed is None or extraction.clean(boxed) != gold:
        return 0.0, "unbalanced"
    if number(gold) is not None:
        return RIGHT
    parsed = _parse(gold)
    if all(isinstance(part, str) for part in parsed):
        return 0.0, "unparsable"  # only the very same text will be accepted
    return RIGHT if _equal(_parse_gold(gold), parsed) else (0.0, "not_equal_to_itself")


def _fast_verdict(found: str, gold: str) -> Judgement | None:
    """Numbers and numerals with a base; None sends the pair to math-verify."""
    value, gold_value = number(found), number(gold)
    if value is not None and gold_value is not None:
        return RIGHT if _same_number(value, gold_value) else WRONG
    base, gold_base = _BASE.fullmatch(found), _BASE.fullmatch(gold)
    if base and gold_base:  # math-verify drops the base
        return RIGHT if base.groups() == gold_base.groups() else WRONG
    if base and gold_value is not None and not _possible_numeral(*base.groups()):
        return WRONG
    return None


_BASE = re.compile(r"(\d+)_\{?(\d{1,2})\}?")


def _possible_numeral(digits: str, base: str) -> bool:
    return 2 <= int(base) <= 16 and all(int(digit) < int(base) for digit in digits)


def _same_number(value: Fraction, gold: Fraction) -> bool:
    if value == gold:
        return True
    # A decimal gold is rounded somewhere; an integer is not. math-verify rounds to six places,
    # which calls every number below 5e-7 zero.
    return gold.denominator != 1 and abs(value - gold) <= abs(gold) * Fraction(1, 1_000_000)


_NUMBER = re.compile(
    r"([-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?)"  # 1,234.5
    r"(?:[eE]([-+]?\d{1,4})|\s*(?:\\times|\\cdot)\s*10\^(?:\{\s*([-+]?\d{1,4})\s*\}|(\d)))?"
)
_POWER_OF_TEN = re.compile(r"10\^(?:\{\s*([-+]?\d{1,4})\s*\}|(\d))")
_MAX_NUMBER_CHARS = 59  # longer ones are refused


def number(text: str) -> Fraction | None:
    r"""The exact value of a plain numeral: `42`, `-1,234.50`, `\$18`, `4.5e33`, `3 \times 10^{-8}`.

    None for everything else. Integers below 10^59, exponents of at most four digits.
    """
    text = plain_form(text)
    if len(text) > _MAX_NUMBER_CHARS:
        return None
    if power := _POWER_OF_TEN.fullmatch(text):
        return Fraction(10) ** int(power[1] or power[2])
    match = _NUMBER.fullmatch(text)
    if match is None or not any(c.isdigit() for c in match[1]):
        return None
    mantissa = match[1].replace(",", "").rstrip(".")
    exponent = int(match[2] or match[3] or match[4] or 0)
    return Fraction(mantissa) * Fraction(10) ** exponent


_TEXT_ONLY = re.compile(r"\\(?:text|mbox|textbf|mathrm)\s*\{([^{}\\]*)\}")
_DROPPED = re.compile(r"(?<!\\)\\!|\\left(?![a-z])|\\right(?![a-z])|\\?\$")
_THIN_SPACE_IN_NUMBER = re.compile(r"(?<=\d)\\,(?=\d{3})")
_SPACES = re.compile(r"(?:\s|~|(?<!\\)\\[ ,;:]|\\q?quad(?![a-zA-Z]))+")


@lru_cache(maxsize=16_384)
def plain_form(text: str) -> str:
    r"""The text without what is mere typesetting: `$`, `\left`, `\!`, `\dfrac`, outer `\text`.

    Two answers with the same plain form say the same thing.
    """
    text = _THIN_SPACE_IN_NUMBER.sub("", extraction.clean(text))
    text = _DROPPED.sub("", text).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = _SPACES.sub(" ", text).strip()
    if text.endswith(".") and not text.endswith("..."):
        text = text[:-1].rstrip()
    whole = _TEXT_ONLY.fullmatch(text)
    return whole[1].strip() if whole else text


def _has_percent(text: str) -> bool:
    return "%" in text or re.search(r"\b(?:percent|pct)\b", text) is not None


# What math-verify 0.9.0 cannot read although it is plain mathematics.
_REWRITES = [
    (re.compile(r"(?<=\d)\.(?=\s*(?:[/)},]|$))"), ""),  # 3./2
    (re.compile(r"^([-+]?\d+\.?\d*)[eE]([-+]?\d{1,4})$"), r"\1 \\times 10^{\2}"),
    (re.compile(r"(?<![A-Za-z\\])E_"), r"\\Xi_"),  # E alone is Euler's number, even with an index
    (re.compile(r"_\{\\odot\s*\}"), "_{o}"),
    (re.compile(r"_\{\\(max|min)\s*\}"), r"_{\1}"),
    (re.compile(r"\bnp\.(arcsin|arccos|arctan|sin|cos|tan|exp|log|pi)\b"), r"\\\1"),
]


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
    return bool(_math_verifier()[0].verify(gold, found, timeout_seconds=None))


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


# --- what math-verify must not be asked -----------------------------------------------------------
#
# Two kinds: answers that say several things at once and that math-verify 0.9.0 accepts all the
# same, and answers that are provably too large. A cleverer net for large ones refuses
# honest answers; what slips through is stopped by the worker's timer.

_RELATION = re.compile(r"(?<![<>!:\\])={1,2}|\\equiv(?![a-zA-Z])")
_SEPARATOR = re.compile(r"[,;]|\\(?:text|mbox|mathrm)\s*\{\s*(?:and|or)\s*\}|\s(?:and|or)\s|\\\\")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_VARIABLE = re.compile(
    r"\\(?:alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|vartheta|iota|kappa|lambda|mu|nu"
    r"|xi|rho|sigma|tau|phi|varphi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Sigma|Phi|Psi|Omega"
    r"|angle|ell)(?![a-zA-Z])"
)
_HEDGE = re.compile(r"\b(or|and|maybe|perhaps|possibly|probably|either|not)\b", re.IGNORECASE)
_TEXT_WITH_DIGIT = re.compile(r"\\(?:text\w*|mbox|mathrm|operatorname)\s*\{[^{}]*\d[^{}]*\}")
_SEVERAL = re.compile(r"[,;]|\\\{|\\pm|\\cup|\b(?:and|or)\b")


def refuse(found: str, gold: str) -> str | None:
    """Why this answer is not evaluated, as a word; None when it may be."""
    return _too_large(found) or _says_several_things(found, gold)


def _says_several_things(found: str, gold: str) -> str | None:
    if _chained(found) and not _chained(gold):
        return "equals"
    hedges = {word.lower() for word in _HEDGE.findall(found)}
    hedges -= {word.lower() for word in _HEDGE.findall(gold)}
    if hedges - {"and", "or"} or hedges and not _SEVERAL.search(gold):
        return "words"
    with_digit = _TEXT_WITH_DIGIT.search(found)
    if with_digit and not _TEXT_WITH_DIGIT.search(gold):
        outside = found[: with_digit.start()] + found[with_digit.end() :]
        if any(c.isdigit() for c in outside):
            return "second_number"
    return None


def _chained(text: str) -> bool:
    """Whether a part is `a = b = c`, or `41 = 42` with numbers on its left."""
    for part in _SEPARATOR.split(text):
        sides = _RELATION.split(part)
        if len(sides) > 2 or len(sides) == 2 and _is_numeric(sides[0]):
            return True
    return False


def _is_numeric(text: str) -> bool:
    if not any(c.isdigit() for c in text) or _VARIABLE.search(text):
        return False
    return not any(c.isalpha() for c in _COMMAND.sub("", text))


_LONG_DIGITS = re.compile(r"\d{60}")
_FACTORIAL = re.compile(r"\d{4,}[\s})]*!|!\s*[})]?\s*!")
_BINOMIAL = re.compile(r"\\[dt]?binom\s*\{?[^{}]*\d{5}|\\[dt]?binom\s*\{[^{}]*\}\s*\{[^{}]*\d{5}")
_EXPONENT = re.compile(r"(?:\^|\*\*)\s*[{(]?\s*[-+]?\s*\d{5}")
_TOWER = re.compile(r"(?:\^|\*\*)\s*[{(]?\s*(\d{1,4})\s*(?:\^|\*\*)\s*[{(]?\s*(\d{1,4})")


def _too_large(text: str) -> str | None:
    if len(text) > 512:
        return "length"
    if text.count("|") > 6:
        return "bars"
    if _depth(text) > 8:
        return "depth"
    if _LONG_DIGITS.search(text):
        return "digits"
    if _FACTORIAL.search(text):
        return "factorial"
    if _BINOMIAL.search(text):
        return "binomial"
    if _EXPONENT.search(text) or any(_huge(*t.groups()) for t in _TOWER.finditer(text)):
        return "exponent"
    return None


def _huge(base: str, exponent: str) -> bool:
    """Whether base^exponent, itself an exponent, has five digits or more."""
    return int(base) > 1 and int(exponent) * math.log10(int(base)) >= 4.0


def _depth(text: str) -> int:
    deepest = depth = 0
    for character in text:
        if character in "{([":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "})]":
            depth -= 1
    return deepest


# --- names and references -------------------------------------------------------------------------

BUILT_IN: dict[str, RewardFunction] = {
    "math_verify": math_verify,
    "exact": exact,
    "gsm8k": gsm8k,
    "reasoning_gym": reasoning_gym,
}

# Attributes rather than a class: a reward stays a plain function that anybody may call.
math_verify.check_gold = _math_verify_gold  # pyright: ignore[reportFunctionMemberAccess]
math_verify.warm_up = _load_math_verify  # pyright: ignore[reportFunctionMemberAccess]
math_verify.max_seconds = MATH_SECONDS  # pyright: ignore[reportFunctionMemberAccess]
exact.check_gold = _exact_gold  # pyright: ignore[reportFunctionMemberAccess]
gsm8k.check_gold = _gsm8k_gold  # pyright: ignore[reportFunctionMemberAccess]
reasoning_gym.check_gold = _gym_gold  # pyright: ignore[reportFunctionMemberAccess]
reasoning_gym.warm_up = _load_gym  # pyright: ignore[reportFunctionMemberAccess]


def check_reference(reference: str) -> str:
    """A name or reference as it is given to a worker, file paths made absolute.

    RewardError for an unknown name, a missing file, or a function that the file does not define.
    No code of the user runs here.
    """
    if ":" not in reference:
        if reference in BUILT_IN:
            return reference
        near = difflib.get_close_matches(reference, BUILT_IN, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise RewardError(
            f"unknown reward '{reference}'{hint} built in: {', '.join(BUILT_IN)}; "
            "or give 'file.py:function' or 'package.module:name'"
        )
    location, _, name = reference.rpartition(":")
    if not location or not name:
        raise RewardError(f"reward '{reference}': expected 'file.py:function' or 'module:name'")
    if not location.endswith(".py"):
        return reference
    path = Path(location)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, _python_files(path.parent), n=1)
        hint = f"; did you mean '{path.with_name(near[0])}'?" if near else ""
        raise RewardError(f"reward '{reference}': no file {location}{hint}")
    try:
        known = _functions_in(path)
    except (SyntaxError, ValueError, OSError) as error:
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise RewardError(f"reward '{reference}': {location}{where}: {error}") from None
    if known is not None and name not in known:
        raise RewardError(_no_such_function(reference, name, location, known))
    return f"{path.resolve()}:{name}"


def _python_files(folder: Path) -> list[str]:
    return [file.name for file in folder.glob("*.py")] if folder.is_dir() else []


def _functions_in(path: Path) -> list[str] | None:
    """Names of the functions that a file defines; None when it may define more than that."""
    tree = ast.parse(path.read_bytes())
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names.append(node.name)
        elif not isinstance(node, ast.Expr | ast.Import) and not _is_future_import(node):
            # An assignment, a class, `from x import y`, an `if`: a function may come out of it.
            return None
    return names


def _is_future_import(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _no_such_function(reference: str, name: str, location: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    there = ", ".join(known) if known else "none"
    return (
        f"reward '{reference}': no function '{name}' in {location}; functions there: {there}{hint}"
    )


def load_function(reference: str) -> RewardFunction:
    """Import the function that a checked reference names, and warm it up. Runs in the worker.

    RewardError with one line when it cannot be imported.
    """
    function = BUILT_IN.get(reference) or _import_function(reference)
    warm_up = getattr(function, "warm_up", None)
    if warm_up is not None:
        warm_up()
    return function


def _import_function(reference: str) -> RewardFunction:
    location, _, name = reference.rpartition(":")
    try:
        module = _import_file(location) if location.endswith(".py") else _import_module(location)
    except RewardError:
        raise
    except BaseException as error:  # a user's file may raise anything, SystemExit included
        raise RewardError(
            f"reward '{reference}': {location} does not import: {describe(error)}"
        ) from None
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if _is_own_function(module, value)]
        raise RewardError(_no_such_function(reference, name, location, own))
    return function


def _import_file(location: str) -> Any:
    path = Path(location)
    name = f"exgrpo_reward_{path.stem}"
    if name in sys.modules and sys.modules[name].__file__ == location:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, location)
    if spec is None or spec.loader is None:
        raise RewardError(f"reward file {location} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # so that the file may import its neighbours
    spec.loader.exec_module(module)
    return module


def _import_module(location: str) -> Any:
    return importlib.import_module(location)


def _is_own_function(module: Any, value: Any) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def describe(error: BaseException) -> str:
    """An exception in one line: its type, its message, and the line of code where it was raised."""
    message = " ".join(str(error).split())[:200]
    trace, where = error.__traceback__, ""
    while trace is not None:
        code = trace.tb_frame.f_code
        where = f" ({Path(code.co_filename).name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(error).__name__}{': ' if message else ''}{message}{where}"
