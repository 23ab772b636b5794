"""Hindsight: the policy revises its failed completions, given the criteria that they missed.

HeRL (arXiv 2603.20046), sections 3.1 and 3.2. For a group whose best reward is below a threshold:

    candidates   the failed completions of the highest reward, at most so many: those that ended by
                 themselves first, then the shorter ones, then at random
    revision     one new completion each, with the draft and its verdict in the prompt
    bonus        r <- r + alpha (r' - r) for each revised one (eq. 8)
    winner       the best revision joins the group, so that K becomes K + 1 (eq. 7)

The winner is trained with the hindsight in its context, in numerator and denominator alike, with
weight r / (r + gamma) and no clip (eqs. 11 and 12). Its prompt, being a prompt, is not trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal, NamedTuple

import numpy as np

from exgrpo_fast.core.types import Group, Question, Trajectory, Verdict
from exgrpo_fast.experience.fresh import FreshSource
from exgrpo_fast.experience.scoring import StreamingScorer, Verifier

Choice = Literal["at_least", "always"]
TIE = 1e-6  # rewards this near are equal


@dataclass(frozen=True)
class HindsightRecipe:
    """`choose`: the best revision joins if it is "at_least" as good as the best completion, or
    "always" (as printed). `naive` drops the hindsight from the context of training: the paper's
    ablation NaiveHE, whose exact denominator is still the one with hindsight."""

    threshold: float = 1.0
    max_revisions: int = 2
    choose: Choice = "at_least"
    bonus: float = 0.05
    clip_negative_bonus: bool = False
    shaping: float = 1.0
    naive: bool = False
    with_replay: bool = False  # revise groups that hold a replayed trajectory, too
    with_prior: bool = False  # and those that hold a prior-guided one


class Candidate(NamedTuple):
    """A failed completion that is to be revised."""

    group: int  # place in the batch
    member: int  # place in the group
    draft: str  # its text
    original: Question
    asked: Question | None  # with hindsight; None where that prompt is too long


@dataclass
class HindsightReport:
    """What one step revised; counts are of groups or of revisions."""

    groups_failed: int = 0
    revisions: int = 0
    skipped_long: int = 0
    better: int = 0
    joined: int = 0
    all_fail_groups: int = 0
    all_fail_became_mixed: int = 0
    tokens: int = 0
    reward_mean: float | None = None

    def metrics(self) -> dict[str, Any]:
        return {f"hindsight_{name}": value for name, value in vars(self).items()}


@dataclass(frozen=True)
class HindsightSource:
    """Revises a batch of scored groups in one more call of the engine."""

    fresh: FreshSource
    verifier: Verifier
    prompt: HindsightPrompt
    recipe: HindsightRecipe
    seed: int = 0

    def revise(self, groups: Sequence[Group], *, step: int) -> tuple[list[Group], HindsightReport]:
        """The groups with bonuses and revisions in place; those already solved are untouched."""
        report = HindsightReport()
        failed = [i for i, group in enumerate(groups) if self._wants_revision(group)]
        report.groups_failed = len(failed)
        report.all_fail_groups = sum(group.num_successes == 0 for group in groups)
        rng = np.random.default_rng([self.seed, step, 0x4E])
        candidates = [
            self._candidate(groups[i], i, member)
            for i in failed
            for member in choose_candidates(groups[i], self.recipe.max_revisions, rng)
        ]
        report.skipped_long = sum(candidate.asked is None for candidate in candidates)
        candidates = [candidate for candidate in candidates if candidate.asked]
        if not candidates:
            return list(groups), report
        revisions = self._generate(candidates, step)
        report.revisions = len(revisions)
        report.tokens = sum(t.num_tokens for t in revisions)
        report.reward_mean = fmean(t.reward for t in revisions)
        report.better = sum(
            revision.reward > groups[c.group].trajectories[c.member].reward + TIE
            for c, revision in zip(candidates, revisions, strict=True)
        )
        return self._join(groups, candidates, revisions, report), report

    def _wants_revision(self, group: Group) -> bool:
        solved = max(group.rewards, default=0.0) >= self.recipe.threshold - TIE
        if solved or (any(group.replayed) and not self.recipe.with_replay):
            return False
        return self.recipe.with_prior or not group.from_source("prior")

    def _candidate(self, group: Group, place: int, member: int) -> Candidate:
        trajectory = group.trajectories[member]
        assert trajectory.verdict is not None
        draft = self.verifier.decode(trajectory.token_ids.tolist())
        asked = self.prompt.ask(group.question, draft, trajectory.verdict, revision=member)
        return Candidate(place, member, draft, group.question, asked)

    def _generate(self, candidates: Sequence[Candidate], step: int) -> list[Trajectory]:
        """One revision of each, verified and scored under its hindsight."""
        asked = [c.asked for c in candidates if c.asked]
        originals = [c.original for c in candidates]
        grading = StreamingScorer(self.verifier, originals, drafts=[c.draft for c in candidates])
        completions = self.fresh.start(asked, [1] * len(asked), step=step).wait(grading)
        trajectories, _ = self.fresh.score(asked, completions, step=step, observer=grading)
        verdicts = grading.verdicts()
        return [
            replace(
                trajectory,
                question=original if self.recipe.naive else trajectory.question,
                source="hindsight",
                shaping=self.recipe.shaping,
                verdict=verdict,
            )
            for trajectory, original, verdict in zip(trajectories, originals, verdicts, strict=True)
        ]

    def _join(
        self,
        groups: Sequence[Group],
        candidates: Sequence[Candidate],
        revisions: Sequence[Trajectory],
        report: HindsightReport,
    ) -> list[Group]:
        joined = list(groups)
        pairs = list(zip(candidates, revisions, strict=True))
        for i in dict.fromkeys(c.group for c in candidates):
            group = groups[i]
            scored = {
                c.member: t
                for c, t in pairs
                if c.group == i and t.verdict is not None and t.verdict.scored
            }
            if not scored:
                continue
            members = list(group.trajectories)
            for member, revision in scored.items():
                gap = revision.reward - members[member].reward
                if self.recipe.clip_negative_bonus:
                    gap = max(gap, 0.0)
                members[member] = replace(members[member], bonus=self.recipe.bonus * gap)
            winner = max(scored.values(), key=lambda t: t.reward)
            if self.recipe.choose == "always" or winner.reward >= max(group.rewards) - TIE:
                members.append(winner)
                report.joined += 1
            joined[i] = Group(group.question, tuple(members))
            was_all_fail = group.num_successes == 0
            report.all_fail_became_mixed += was_all_fail and joined[i].num_successes > 0
        return joined


def choose_candidates(group: Group, count: int, rng: np.random.Generator) -> list[int]:
    """Places of the best failed completions (eq. 5), best first, at most `count`."""
    best = max(group.rewards)
    tied = [i for i, reward in enumerate(group.rewards) if reward >= best - TIE]
    lot = rng.permutation(len(group.trajectories))
    of = group.trajectories
    return sorted(tied, key=lambda i: (of[i].truncated, of[i].num_tokens, int(lot[i])))[:count]


# --- the prompt -----------------------------------------------------------------------------------

ANSWER = "The final answer is right."


def hindsight_text(task: str, draft: str, met: Sequence[str], missed: Sequence[str]) -> str:
    """The user message."""
    parts = [task, "Your earlier solution:", draft]
    if met:
        parts.append("What it met:\n" + "\n".join(f"- {text}" for text in met))
    parts.append("What it missed:\n" + "\n".join(f"- {text}" for text in missed))
    parts.append(
        "Find the mistake, keep what is right, and write one complete new solution. "
        "Do not speak of the earlier one."
    )
    return "\n".join(parts)


@dataclass(frozen=True)
class HindsightPrompt:
    """Question, draft and verdict -> the question as it is asked for a revision.

    It shows the task, the earlier solution, and which requirements that met and missed, in their
    public words. It never shows the reference answer, and it is never cut: one that is too long is
    no prompt.
    `public_texts`: the words of each rubric, known once a worker has loaded them; without any, the
    answer alone is spoken of.
    """

    tokenizer: Any
    public_texts: Callable[[], Mapping[str, str]]
    max_prompt_tokens: int

    def ask(
        self, question: Question, draft: str, verdict: Verdict, *, revision: int
    ) -> Question | None:
        """None when the prompt would be longer than allowed."""
        conversation = list(question.conversation)
        task = conversation[-1]["content"]
        text = hindsight_text(task, draft, *self._met_and_missed(verdict))
        conversation[-1] = {"role": "user", "content": text}
        prompt, ids = self._render(conversation)
        if len(ids) > self.max_prompt_tokens:
            return None
        return Question(
            id=f"{question.id}/revision{revision}",
            prompt_ids=tuple(ids),
            prompt=prompt,
            answer=question.answer,
            columns=question.columns,
            conversation=question.conversation,
        )

    def _met_and_missed(self, verdict: Verdict) -> tuple[list[str], list[str]]:
        texts = self.public_texts()
        checks = [(texts.get(name, name), met) for name, met in verdict.checks]
        checks = checks or [(ANSWER, verdict.successful)]
        return [text for text, met in checks if met], [text for text, met in checks if not met]

    def _render(self, conversation: Sequence[Mapping[str, Any]]) -> tuple[str, list[int]]:
        if getattr(self.tokenizer, "chat_template", None):
            text = self.tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True
            )
            return text, self.tokenizer(text, add_special_tokens=False)["input_ids"]
        text = "\n\n".join(message["content"] for message in conversation)
        return text, self.tokenizer(text)["input_ids"]
