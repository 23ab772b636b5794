r"""Rubrics: a completion is judged by several yes-or-no checks, and the reward is how much is met.

    reward = sum_j w_j I_j / sum_j w_j   over the rubrics that apply      HeRL, arXiv 2603.20046, Eq 4

A list of `Rubric` at the top level of a file is a reward like any other ('file.py:NAME') and runs in
the same killable workers. A rubric without a check is for the judge (judge.py, rubric_scorer.py):
the workers leave it out. Only the public texts leave the workers; they say what is asked for, never
the answer. Loads no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from exgrpo_fast.rewards.judgement import Judgement, Result, RewardError, RewardFunction, describe
from exgrpo_fast.rewards.verifiers import extraction
from exgrpo_fast.rewards.verifiers.functions import reasoning_gym
from exgrpo_fast.rewards.verifiers.mathematics import math_verify

Check = Callable[[str, str, Mapping[str, Any]], bool]  # prompt, completion, context
AppliesTo = Literal["all", "revision"]


@dataclass(frozen=True)
class Rubric:
    """One thing that is asked of a completion.

    weight: None counts as 1, a negative one as 0.
    check: `check(prompt, completion, context) -> bool`. The context holds `answer`, `truncated` (the
        length limit ended the completion), `draft` (the completion that this one revises, else None) and
        the other columns of the data row. None: the judge decides by the public text.
    public_text: the rubric in words, for the policy and the judge to read; never the answer.
    applies_to: `revision` is asked only of completions that revise a draft.
    RewardError, in one line, for a rubric that nobody could decide.
    """

    name: str
    weight: float | None = 1.0
    check: Check | None = None
    public_text: str = ""
    applies_to: AppliesTo = "all"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise RewardError(f"a rubric needs a name, got {self.name!r}")
        is_number = isinstance(self.weight, int | float) and math.isfinite(self.weight)
        if self.weight is not None and not is_number:
            raise RewardError(f"rubric '{self.name}': weight {self.weight!r} is not a number")
        if self.check is not None and not callable(self.check):
            raise RewardError(f"rubric '{self.name}': its check is no function")
        if self.check is None and not self.public_text.strip():
            raise RewardError(f"rubric '{self.name}': no check, and no public_text for a judge")
        if self.applies_to not in ("all", "revision"):
            raise RewardError(
                f"rubric '{self.name}': applies_to is 'all' or 'revision', got {self.applies_to!r}"
            )

    @property
    def text(self) -> RubricText:
        return RubricText(
            self.public_text, effective_weight(self.weight), self.applies_to, self.check is None
        )


class RubricText(NamedTuple):
    """What is known of a rubric outside the workers."""

    public_text: str
    weight: float  # at least 0
    applies_to: AppliesTo
    judged: bool  # by the judge rather than by a check

    def applies(self, columns: Mapping[str, Any]) -> bool:
        return self.applies_to == "all" or columns.get("draft") is not None


class JudgeRequest(NamedTuple):
    """What the judge is asked about one completion."""

    prompt: str
    response: str
    rubrics: tuple[tuple[str, float], ...]  # what is asked for, and its weight


# --- from checks to a reward ----------------------------------------------------------------------


def effective_weight(weight: float | None) -> float:
    return 1.0 if weight is None else max(0.0, float(weight))


def weighted_share(weights: Sequence[float | None], met: Sequence[bool]) -> float:
    """sum w I / sum w (HeRL Eq 4): the share of the weight that is met; 1 where all is met."""
    pairs = [(effective_weight(w), m) for w, m in zip(weights, met, strict=True)]
    return sum(w for w, m in pairs if m) / sum(w for w, _ in pairs)


def summarise(texts: Mapping[str, RubricText], checks: Sequence[tuple[str, bool]]) -> Judgement:
    """Reward and reason of checks by name: `ok`, or `unmet:` with the heaviest that is not met."""
    reward = weighted_share([texts[name].weight for name, _ in checks], [met for _, met in checks])
    unmet = [name for name, met in checks if not met]
    if not unmet:
        return reward, "ok"
    return reward, f"unmet:{max(unmet, key=lambda name: texts[name].weight)}"


class RubricReward:
    """A list of rubrics as a reward function, for the workers to call.

    A check that raises counts as unmet, and the sample's reason is `error:<ExceptionName>`.
    RewardError, in one line, for a list that makes no reward.
    """

    def __init__(self, rubrics: Sequence[Rubric], called: str = "rubrics") -> None:
        _refuse_unusable(rubrics, called)
        self.rubrics = list(rubrics)
        self.texts = {rubric.name: rubric.text for rubric in rubrics}
        for name in ("max_seconds", "max_cpu_seconds"):
            limits = [getattr(r.check, name) for r in rubrics if hasattr(r.check, name)]
            if limits:
                setattr(self, name, min(limits))

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[Result]:
        return [
            self._judge(prompt, completion, {name: value[i] for name, value in columns.items()})
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]

    def warm_up(self) -> None:
        for rubric in self.rubrics:
            getattr(rubric.check, "warm_up", lambda: None)()

    def check_gold(self, answer: str, columns: Mapping[str, Any]) -> Any:
        """What the first check that knows gold answers says; None when none of them does."""
        for rubric in self.rubrics:
            if hasattr(rubric.check, "check_gold"):
                return rubric.check.check_gold(answer, columns)  # pyright: ignore
        return None, "unscored"

    def _judge(self, prompt: str, completion: str, columns: Mapping[str, Any]) -> Result:
        context = {"truncated": False, "draft": None, **columns}
        checks, faults = [], []
        for rubric in self.rubrics:
            if rubric.check is None or not rubric.text.applies(context):
                continue
            try:
                met = _as_bool(rubric.check(prompt, completion, context))
            except (Exception, SystemExit) as error:  # the worker's timer is neither
                met = False
                fault = f"rubric '{rubric.name}': {describe(error)}"
                faults.append((f"error:{type(error).__name__}", fault))
            checks.append((rubric.name, met))
        all_judged = not any(self.texts[name].weight for name, _ in checks)
        reward, reason = (None, "unscored") if all_judged else summarise(self.texts, checks)
        reason, detail = faults[0] if faults else (reason, "")
        return Result(reward, reason, detail, tuple(checks))


def _refuse_unusable(rubrics: Sequence[Rubric], called: str) -> None:
    if not rubrics:
        raise RewardError(f"{called}: the list is empty; expected at least one Rubric")
    for place, rubric in enumerate(rubrics):
        if not isinstance(rubric, Rubric):
            kind = type(rubric).__name__
            raise RewardError(f"{called}: entry {place} is a {kind}, expected a Rubric")
    names = [rubric.name for rubric in rubrics]
    for name in names:
        if names.count(name) > 1:
            raise RewardError(f"{called}: two rubrics are called '{name}'")
    if not any(r.text.weight for r in rubrics if r.applies_to == "all"):
        raise RewardError(f"{called}: all weights are 0; one that applies to all must be positive")


def _as_bool(value: Any) -> bool:
    # Truth alone would do for the coroutine of an async check, and hide a missing `return`.
    if value not in (True, False):
        raise TypeError(f"returned {type(value).__name__} instead of True or False")
    return bool(value)


# --- checks ---------------------------------------------------------------------------------------


def finished(prompt: str, completion: str, context: Mapping[str, Any]) -> bool:
    """The completion ended with an end token, before the length limit."""
    return not context["truncated"]


def correct_by(reward: RewardFunction) -> Check:
    """Met where a reward gives full marks; gold answers are checked as that reward checks them."""

    def check(prompt: str, completion: str, context: Mapping[str, Any]) -> bool:
        columns = {name: [value] for name, value in context.items()}
        [judgement] = reward(prompts=[prompt], completions=[completion], **columns)
        return judgement[0] == 1.0

    return _like(reward, check)


def _like(original: Any, check: Check) -> Check:
    for name in ("check_gold", "warm_up", "max_seconds", "max_cpu_seconds"):
        if hasattr(original, name):
            setattr(check, name, getattr(original, name))
    return check


# --- mathematics ----------------------------------------------------------------------------------

_BOX = re.compile(r"\\boxed\s*\{")
_DISPLAY_END = re.compile(r"(?:\\\]|\$\$|\\end\{\w+\*?\})?\.?")
_EARLIER = r"(?:earlier|previous|prior|preceding)"
_META = re.compile(
    rf"\b{_EARLIER}\s+(?:attempt|draft|solution|response|answer|reply|version|reasoning)\b"
    r"|\b(?:original|initial|first|last)\s+(?:attempt|draft|response|reply)\b"
    r"|\b(?:the|this|that|my|your)\s+draft\b"
    r"|\b(?:this|that|your)\s+feedback\b"
    r"|\b(?:according\s+to|based\s+on|following|given)\s+the\s+feedback\b"
    r"|\bthe\s+feedback\s+(?:says|said|states|notes|points|was|is)\b"
    r"|\brubrics?\b"
    r"|\b(?:un)?met\s+(?:requirement|criteri)"
    r"|\b(?:revised|corrected|rewritten|improved)\s+(?:solution|answer|version|response)\b"
    r"|\b(?:error|mistake|slip)\s+in\s+(?:the|my|your)\s+(?:solution|draft|response|reasoning)\b"
    r"|\b(?:asked|told|instructed)\s+to\s+(?:revise|rewrite|correct|improve)\b",
    re.IGNORECASE,
)

_correct_by_math_verify = correct_by(math_verify)


def _correct_in_the_box(prompt: str, completion: str, context: Mapping[str, Any]) -> bool:
    if extraction.last_box(extraction.visible_part(completion)) is None:
        return False  # math_verify alone would take `#### 72`, too
    return _correct_by_math_verify(prompt, completion, context)


def boxed_once(prompt: str, completion: str, context: Mapping[str, Any]) -> bool:
    r"""Exactly one `\boxed{}`, not empty, in the last line; a display may end on the next."""
    text = extraction.visible_part(completion)
    content, boxes = extraction.last_box(text), list(_BOX.finditer(text))
    if content is None or not extraction.clean(content) or len(boxes) != 1:
        return False
    after = text[boxes[0].end() + len(content) + 1 :]
    return _DISPLAY_END.fullmatch(after.partition("\n")[2].strip()) is not None


def no_meta(prompt: str, completion: str, context: Mapping[str, Any]) -> bool:
    """Nothing is said about a draft, feedback, rubrics or an earlier attempt."""
    return _META.search(completion) is None


# Any wrong answer stays at or below .2, so that form cannot outbid correctness (HeRL, our choice).
MATHS_RUBRICS = [
    Rubric(
        "answer_correct",
        8.0,
        _like(math_verify, _correct_in_the_box),
        "The final answer is mathematically right.",
    ),
    Rubric(
        "boxed_once",
        1.0,
        boxed_once,
        r"The solution ends with its final answer in \boxed{}, and nothing else is boxed.",
    ),
    Rubric("finished", 0.5, finished, "The solution is complete: it ends before the length limit."),
    Rubric(
        "no_meta",
        0.5,
        no_meta,
        "The text reads as a solution written from scratch and mentions no other version of itself.",
        applies_to="revision",
    ),
]


# --- sums: the quickstart's task ------------------------------------------------------------------

_STEP = re.compile(r"(-?[0-9]{1,18}(?:[+-][0-9]{1,18})+)=(-?[0-9]{1,18})")
_TERM = re.compile(r"[+-]?[0-9]+")


def answer_once(prompt: str, completion: str, context: Mapping[str, Any]) -> bool:
    """Exactly one `<answer>...</answer>`, not empty."""
    content = extraction.last_tag(completion)
    tags = completion.count("<answer>"), completion.count("</answer>")
    return tags == (1, 1) and content is not None and content.strip() != ""


def steps_true(prompt: str, completion: str, context: Mapping[str, Any]) -> bool:
    """At least one line `a+b=c`, and every line with an equals sign is one and holds."""
    lines = [line.replace(" ", "") for line in completion.split("\n") if "=" in line]
    return bool(lines) and all(map(_holds, lines))


def _holds(line: str) -> bool:
    step = _STEP.fullmatch(line)
    return step is not None and sum(map(int, _TERM.findall(step[1]))) == int(step[2])


SUMS_RUBRICS = [
    Rubric(
        "answer_correct", 8.0, correct_by(reasoning_gym), "The final answer is the right number."
    ),
    Rubric(
        "answer_once",
        1.0,
        answer_once,
        "There is exactly one answer, between <answer> and </answer>.",
    ),
    Rubric("finished", 0.5, finished, "The solution is complete: it ends before the length limit."),
    Rubric(
        "steps_true",
        0.5,
        steps_true,
        "The steps are shown, one sum or difference a line, and each of them is true.",
    ),
]

RUBRIC_SETS: dict[str, RubricReward] = {
    "maths_rubrics": RubricReward(MATHS_RUBRICS, "maths_rubrics"),
    "sums_rubrics": RubricReward(SUMS_RUBRICS, "sums_rubrics"),
}
