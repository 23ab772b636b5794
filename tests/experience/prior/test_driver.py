"""The driver on scripted and on enumerated engines: its law, its cuts, its ends, its seeds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import pytest
import torch
from tabular import Tabular

from exgrpo_fast.experience.prior.driver import GuidedCompletion, Resampler
from exgrpo_fast.experience.prior.protocols import Draft, DraftScores, Drawn, EngineResult, Prefix
from exgrpo_fast.experience.prior.triggers import Trigger
from exgrpo_fast.rollout.engine import Request

EOS = 9


# --- the law, over every random choice ------------------------------------------------------------


class Choices:
    """Every way through a program that chooses: depth first, one run after the other."""

    def __init__(self) -> None:
        self.script: list[int] = []
        self.start()

    def start(self) -> None:
        self.taken: list[tuple[int, int]] = []  # (choice, number of choices)
        self.probability = 1.0

    def choose(self, probabilities: Sequence[float]) -> int:
        place = len(self.taken)
        choice = self.script[place] if place < len(self.script) else 0
        self.taken.append((choice, len(probabilities)))
        self.probability *= probabilities[choice]
        return choice

    def next(self) -> bool:
        while self.taken and self.taken[-1][0] + 1 == self.taken[-1][1]:
            self.taken.pop()
        if not self.taken:
            return False
        self.script = [choice for choice, _ in self.taken]
        self.script[-1] += 1
        return True


class EnumeratedEngine:
    """Policy and prior of a table; what is drawn is chosen by `choices`."""

    concurrent = False
    prefix_block: int | None = None

    def __init__(self, problem: Tabular, choices: Choices) -> None:
        self.problem, self.choices = problem, choices

    def _row(self, table_SV: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
        return table_SV[self.problem.index[tuple(tokens)]]

    def draft(self, prefixes, lengths, seeds, *, distributions=False):
        ((_, prefix),), (length,) = prefixes, lengths
        tokens, rows = [], []
        for _ in range(length):
            rows.append(self._row(self.problem.logp_SV, [*prefix, *tokens]))
            tokens.append(self.choices.choose(rows[-1].exp().tolist()))
        chosen = torch.stack([row[token] for row, token in zip(rows, tokens, strict=True)])
        return EngineResult([Draft(tokens, chosen, torch.stack(rows))])

    def score(self, prefixes, drafts, *, distributions=False):
        ((_, prefix),), (draft,) = prefixes, drafts
        rows = torch.stack(
            [self._row(self.problem.logr_SV, [*prefix, *draft[:k]]) for k in range(len(draft))]
        )
        return EngineResult([DraftScores(rows.gather(1, torch.tensor(draft)[:, None])[:, 0], rows)])

    def draw(self, prefixes, seeds):
        ((_, prefix),) = prefixes
        row = self._row(self.problem.logr_SV, prefix)
        token = self.choices.choose(row.exp().tolist())
        return EngineResult([Drawn(token, float(row[token]))])

    def whole_completions(self, prompts, completions):
        raise NotImplementedError

    def forget(self) -> None:
        pass


@pytest.mark.parametrize("block_tokens", [1, 2, 3, 4])
@pytest.mark.parametrize(("rule", "threshold"), [("ratio", 0.5), ("tv", 0.26)])
def test_blocks_change_nothing(rule, threshold: float, block_tokens: int) -> None:
    """Proposition 2 of the very code that runs: the law of completion and flags is the product of
    the laws of its positions, whatever K is."""
    problem = Tabular(Trigger(rule, threshold), num_tokens=3, horizon=3)
    choices, found = Choices(), defaultdict(float)
    engine = EnumeratedEngine(problem, choices)
    resampler = Resampler(
        engine,
        engine,
        Trigger(rule, threshold),
        block_tokens=block_tokens,
        max_completion_tokens=3,
        eos_token_ids=[EOS],
    )
    while True:
        choices.start()
        (completion,) = resampler.start([Request((), 1)]).finish()
        found[tuple(completion.token_ids), tuple(completion.redrawn)] += choices.probability
        if not choices.next():
            break
    expected = {(p.tokens, tuple(p.redrawn_T.tolist())): p.probability for p in problem.paths()}
    assert any(any(flags) for _, flags in expected) and any(not any(f) for _, f in expected)
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-12)
    assert {k: v for k, v in found.items() if v > 0} == pytest.approx(expected, abs=1e-12)


# --- scripted rounds ------------------------------------------------------------------------------


class Script:
    """Drafts, scores and draws as they are listed, one completion; notes what it was asked."""

    concurrent = False

    def __init__(self, drafts, scores, draws, *, prefix_block=None, late: int = 0) -> None:
        self.drafts, self.scores, self.draws = list(drafts), list(scores), list(draws)
        self.prefix_block = prefix_block
        self.late = late
        self.asked: list[tuple[str, list[int]]] = []
        self.seeds: list[int] = []
        self.forgot = 0

    def _result(self, value):
        return Late(value, self.late)

    def draft(self, prefixes: Sequence[Prefix], lengths, seeds, *, distributions=False):
        self.asked.append(("draft", prefixes[0].token_ids + [lengths[0]]))
        self.seeds += seeds
        tokens, logprobs = self.drafts.pop(0)
        assert len(tokens) <= lengths[0]
        return self._result([Draft(tokens, torch.tensor(logprobs))])

    def score(self, prefixes, drafts, *, distributions=False):
        self.asked.append(("score", [*prefixes[0].token_ids, *drafts[0]]))
        return self._result([DraftScores(torch.tensor(self.scores.pop(0)))])

    def draw(self, prefixes, seeds):
        self.asked.append(("draw", prefixes[0].token_ids))
        self.seeds += seeds
        return self._result([Drawn(*self.draws.pop(0))])

    def whole_completions(self, prompts, completions):
        raise NotImplementedError

    def forget(self) -> None:
        self.forgot += 1


class Late(EngineResult):
    """A reply that is ready when it has been asked `late` times."""

    def __init__(self, value, late: int) -> None:
        self.value, self.late = value, late

    def ready(self) -> bool:
        self.late -= 1
        return self.late < 0

    def result(self):
        assert self.late < 0
        return self.value


def run(
    script: Script, *, block_tokens: int = 5, limit: int = 20, seed: int = 1
) -> GuidedCompletion:
    resampler = Resampler(
        script,
        script,
        Trigger("ratio", 0.5),
        block_tokens=block_tokens,
        max_completion_tokens=limit,
        eos_token_ids=[EOS],
    )
    (completion,) = resampler.start([Request((100, 101), seed)]).finish()
    assert script.forgot == 2 and not script.drafts and not script.draws
    return completion


E2_DRAFT = ([1, 2, 3, 4, 5], [-0.10, -1.20, -0.40, -2.00, -0.05])
E2_SCORES = [-0.30, -0.60, -1.10, -3.50, -0.04]


def test_e2_keep_two_redraw_the_third_drop_the_rest() -> None:
    script = Script([E2_DRAFT, ([EOS], [-0.1])], [E2_SCORES, [-0.1]], [(7, -0.9)])
    completion = run(script)
    assert completion.token_ids == [1, 2, 7, EOS]
    assert completion.redrawn == [False, False, True, False]
    assert completion.rejected == [-1, -1, 3, -1]
    assert completion.tested == pytest.approx([0.2, -0.6, 0.7, 0.0], abs=1e-6)
    assert completion.prior_logprobs == pytest.approx([-0.3, -0.6, -0.9, -0.1])
    assert completion.draft_logprobs[:2] == pytest.approx([-0.1, -1.2])
    assert math.isnan(completion.draft_logprobs[2])
    assert (completion.rounds, completion.drafted, completion.ended) == (2, 6, True)
    assert script.asked == [
        ("draft", [100, 101, 5]),
        ("score", [100, 101, 1, 2, 3, 4, 5]),
        ("draw", [100, 101, 1, 2]),
        ("draft", [100, 101, 1, 2, 7, 5]),
        ("score", [100, 101, 1, 2, 7, EOS]),
    ]


def test_an_end_in_a_draft_that_is_rejected_is_no_end() -> None:
    script = Script(
        [([1, EOS], [-0.1, -0.1]), ([EOS], [-0.1])], [[-0.1, -3.0], [-0.1]], [(4, -0.5)]
    )
    completion = run(script)
    assert completion.token_ids == [1, 4, EOS] and completion.rejected == [-1, EOS, -1]


def test_an_end_behind_the_first_rejection_is_dropped() -> None:
    script = Script(
        [([1, EOS], [-0.1, -0.1]), ([EOS], [-0.1])], [[-2.0, -0.1], [-0.1]], [(4, -0.5)]
    )
    assert run(script).token_ids == [4, EOS]


def test_an_end_from_the_prior_ends() -> None:
    completion = run(Script([([1, 2], [-0.1, -0.1])], [[-0.1, -2.0]], [(EOS, -0.5)]))
    assert completion.token_ids == [1, EOS] and completion.ended
    assert not completion.completion().truncated


def test_the_replacement_may_be_the_rejected_token_and_is_not_tested_again() -> None:
    script = Script([([1], [-0.1]), ([EOS], [-0.1])], [[-3.0], [-0.1]], [(1, -3.0)])
    completion = run(script, block_tokens=1)
    assert completion.token_ids == [1, EOS]
    assert (completion.redrawn, completion.rejected) == ([True, False], [1, -1])


def test_the_limit_ends_and_drafts_never_pass_it() -> None:
    script = Script([([1, 2, 3], [-0.1] * 3), ([4], [-0.1])], [[-0.1] * 3, [-0.1]], [])
    completion = run(script, block_tokens=3, limit=4)
    assert completion.token_ids == [1, 2, 3, 4] and completion.completion().truncated
    assert [ids[-1] for name, ids in script.asked if name == "draft"] == [3, 1]


def test_a_draft_does_not_end_on_a_block_of_the_priors_cache() -> None:
    """(2 + 6) % 4 == 0 -> 5 tokens; (7 + 6) % 4 == 1 -> 6; and never fewer than one."""
    script = Script(
        [([1] * 5, [-0.1] * 5), ([2] * 5 + [EOS], [-0.1] * 6)],
        [[-0.1] * 5, [-0.1] * 6],
        [],
        prefix_block=4,
    )
    run(script, block_tokens=6)
    assert [ids[-1] for name, ids in script.asked if name == "draft"] == [5, 6]
    one = Script([([1], [-0.1]), ([EOS], [-0.1])], [[-0.1], [-0.1]], [], prefix_block=1)
    assert run(one, block_tokens=1).token_ids == [1, EOS]


def test_seeds_differ_by_round_and_purpose_and_repeat() -> None:
    def seeds(seed: int) -> list[int]:
        script = Script([E2_DRAFT, ([EOS], [-0.1])], [E2_SCORES, [-0.1]], [(7, -0.9)])
        run(script, seed=seed)
        return script.seeds

    assert len(set(seeds(1) + seeds(2))) == 6 and seeds(1) == seeds(1)


@pytest.mark.parametrize("late", [0, 3])
def test_late_replies_never_make_anyone_wait(late: int) -> None:
    script = Script([E2_DRAFT, ([EOS], [-0.1])], [E2_SCORES, [-0.1]], [(7, -0.9)], late=late)
    resampler = Resampler(
        script,
        script,
        Trigger(),
        block_tokens=5,
        max_completion_tokens=20,
        eos_token_ids=[EOS],
    )
    session = resampler.start([Request((100, 101), 1)])
    assert script.asked == []
    count = 0
    while session.advance():
        count += 1
    assert count == 2 + 5 * late  # two rounds, five calls
    assert session.finish()[0].token_ids == [1, 2, 7, EOS]


@pytest.mark.parametrize(
    ("rule", "delta", "keep"),
    [("soft_ratio", 0.9, math.exp(-0.4)), ("defensive", 0.9, 0.3), ("random", -5.0, 0.7)],
)
def test_lots_are_drawn_at_the_keep_probability(rule, delta: float, keep: float) -> None:
    count, kept = 3000, 0
    trigger = Trigger(rule, 0.5, rate=0.3)
    for seed in range(count):
        script = Script([([1], [delta - 4.0])], [[-4.0]], [(2, -1.0)])
        resampler = Resampler(
            script, script, trigger, block_tokens=1, max_completion_tokens=1, eos_token_ids=[EOS]
        )
        (completion,) = resampler.start([Request((5,), seed)]).finish()
        kept += completion.token_ids == [1]
    sigma = math.sqrt(keep * (1 - keep) / count)
    assert abs(kept / count - keep) < 4 * sigma
