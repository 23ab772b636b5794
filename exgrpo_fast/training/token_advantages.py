"""Advantages of single tokens: which tokens of an update are trained, and how strongly.

Each method is a pure function of vectors over the N tokens of one update, and a rule that applies it
to the terms of the loss. All of it is known before the update: the trajectory's advantage, the
entropies and log-probs that were taken when the trajectory was scored, and those of a teacher.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from exgrpo_fast.core.types import Trajectory
from exgrpo_fast.training.batch import LossTerm

Rule = Callable[[Sequence[LossTerm]], list[LossTerm]]


# --- high-entropy tokens --------------------------------------------------------------------------


def highest_entropies(entropies_N: Tensor, share: float) -> Tensor:
    """(N,) -> (N,) bool: the ceil(share x N) largest; of equal ones the first.

    The forking tokens of arXiv 2506.01939 (eq. 6), there share = 0.2.
    """
    count = math.ceil(share * len(entropies_N) - 1e-9)
    order = torch.argsort(entropies_N, descending=True, stable=True)
    return torch.zeros_like(entropies_N, dtype=torch.bool).index_fill_(0, order[:count], True)


@dataclass(frozen=True)
class HighEntropyTokens:
    """Only the tokens of highest entropy have an advantage; KL and entropy term stay on all.

    `divide_by`: "kept", the paper's, makes up for the others in the normaliser; "all", TRL's
    `top_entropy_quantile`, does not, which makes the step smaller by the share.
    """

    share: float
    divide_by: Literal["kept", "all"] = "kept"

    def __call__(self, terms: Sequence[LossTerm]) -> list[LossTerm]:
        entropies_N = _joined([term.trajectory.entropies for term in terms])
        kept_N = highest_entropies(entropies_N, self.share)
        scale = len(kept_N) / max(int(kept_N.sum()), 1) if self.divide_by == "kept" else 1.0
        return _with_advantages(terms, scale * kept_N * _advantages(terms))


# --- entropy-shaped advantage ---------------------------------------------------------------------


def entropy_shaped(
    advantages_N: Tensor, entropies_N: Tensor, *, alpha: float, kappa: float
) -> Tensor:
    """A + min(alpha H, |A| / kappa) (arXiv 2506.14758, eqs. 5 and 6): no sign changes for kappa > 1."""
    return advantages_N + torch.minimum(alpha * entropies_N, advantages_N.abs() / kappa)


@dataclass(frozen=True)
class EntropyShaping:
    """The paper: alpha 0.4 with GRPO, kappa 2, advantages divided by their std."""

    alpha: float
    kappa: float = 2.0

    def __call__(self, terms: Sequence[LossTerm]) -> list[LossTerm]:
        entropies_N = _joined([term.trajectory.entropies for term in terms])
        shaped_N = entropy_shaped(
            _advantages(terms), entropies_N, alpha=self.alpha, kappa=self.kappa
        )
        return _with_advantages(terms, shaped_N)


# --- on-policy distillation -----------------------------------------------------------------------


def distilled(
    advantages_N: Tensor, behaviour_N: Tensor, teacher_N: Tensor, *, coef: float
) -> Tensor:
    """A - coef (log pi_old - log teacher): the reverse KL of each sampled token as an advantage.

    As in tinker-cookbook's on-policy distillation. 0 for a token outside the teacher's support.
    """
    found = advantages_N - coef * (behaviour_N - teacher_N)
    return torch.where(teacher_N == -math.inf, 0.0, found)


@dataclass(frozen=True)
class Distillation:
    """`teacher_logprobs`: trajectories -> float32 [T] of each. Without `with_rewards` the
    advantages of the groups are left out."""

    teacher_logprobs: Callable[[Sequence[Trajectory]], list[Tensor]]
    coef: float
    with_rewards: bool

    def __call__(self, terms: Sequence[LossTerm]) -> list[LossTerm]:
        trajectories = [term.trajectory for term in terms]
        behaviour_N = _joined([trajectory.behaviour_logprobs for trajectory in trajectories])
        teacher_N = _joined(self.teacher_logprobs(trajectories))
        advantages_N = _advantages(terms) * float(self.with_rewards)
        return _with_advantages(
            terms, distilled(advantages_N, behaviour_N, teacher_N, coef=self.coef)
        )


def without_rewards(terms: Sequence[LossTerm]) -> list[LossTerm]:
    """No advantages: for distillation over the whole vocabulary, whose loss stands beside theirs."""
    return [term._replace(advantage=0.0) for term in terms]


# --- covariance of log-prob and advantage ---------------------------------------------------------


def covariances(advantages_N: Tensor, logprobs_N: Tensor) -> Tensor:
    """(A - mean A)(log pi - mean log pi) of each token (arXiv 2505.22617)."""
    return (advantages_N - advantages_N.mean()) * (logprobs_N - logprobs_N.mean())


def clip_cov(
    covariances_N: Tensor,
    *,
    share: float,
    low: float,
    high: float,
    generator: torch.Generator,
    clipped_N: Tensor | None = None,
) -> Tensor:
    """(N,) bool: max(int(share x N), 1) tokens drawn from those with low < covariance < high.

    Clip-Cov, arXiv 2505.22617: the gradient of drawn tokens is dropped. `clipped_N`: tokens that a
    clip silences already, which are not drawn.
    """
    eligible = (covariances_N > low) & (covariances_N < high)
    if clipped_N is not None:
        eligible &= ~clipped_N
    candidates = eligible.nonzero().squeeze(1)
    order = torch.randperm(len(candidates), generator=generator)
    drawn = candidates[order[: max(int(share * len(covariances_N)), 1)]]
    return torch.zeros_like(eligible).index_fill_(0, drawn, True)


def kl_cov(covariances_N: Tensor, *, share: float) -> Tensor:
    """(N,) bool: the max(int(share x N), 1) tokens of largest covariance.

    KL-Cov, arXiv 2505.22617: they alone get the KL term.
    """
    count = max(int(share * len(covariances_N)), 1)
    picked = covariances_N.topk(min(count, len(covariances_N))).indices
    return torch.zeros_like(covariances_N, dtype=torch.bool).index_fill_(0, picked, True)


@dataclass(frozen=True)
class ClipCov:
    """A seeded draw over the update; verl draws in each micro-batch, unseeded."""

    share: float
    low: float
    high: float
    seed: int

    def __call__(self, terms: Sequence[LossTerm]) -> list[LossTerm]:
        advantages_N = _advantages(terms)
        found_N = covariances(advantages_N, _logprobs(terms))
        drawn_N = clip_cov(
            found_N,
            share=self.share,
            low=self.low,
            high=self.high,
            generator=_generator(self.seed, terms),
        )
        return _with_advantages(terms, advantages_N.masked_fill(drawn_N, 0.0))


@dataclass(frozen=True)
class KLCov:
    """The KL term of the objective applies to the picked tokens alone.

    With the estimator abs and the behaviour log-probs as its reference this is the paper's
    |log ratio|, whose slope is 0 until the policy has moved from them.
    """

    share: float

    def __call__(self, terms: Sequence[LossTerm]) -> list[LossTerm]:
        picked_N = kl_cov(covariances(_advantages(terms), _logprobs(terms)), share=self.share)
        split = picked_N.float().split([term.trajectory.num_tokens for term in terms])
        return [term._replace(kl_weights=own) for term, own in zip(terms, split, strict=True)]


# --- terms as vectors -----------------------------------------------------------------------------


def apply_rules(rules: Sequence[Rule], terms: Sequence[LossTerm]) -> list[LossTerm]:
    """The terms after every rule, which see those with a weight only, in their order."""
    counted = [term for term in terms if term.weight != 0.0]
    if not counted:
        return list(terms)
    for rule in rules:
        counted = rule(counted)
    ruled = iter(counted)
    return [next(ruled) if term.weight != 0.0 else term for term in terms]


def _joined(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.float().cpu() for value in values])


def _advantages(terms: Sequence[LossTerm]) -> Tensor:
    return _joined([term.advantages_T for term in terms])


def _logprobs(terms: Sequence[LossTerm]) -> Tensor:
    """Of the policy at the start of the step where that is known, else when they were scored."""
    trajectories = [term.trajectory for term in terms]
    return _joined(
        [
            t.behaviour_logprobs if t.proximal_logprobs is None else t.proximal_logprobs
            for t in trajectories
        ]
    )


def _with_advantages(terms: Sequence[LossTerm], advantages_N: Tensor) -> list[LossTerm]:
    split = advantages_N.split([term.trajectory.num_tokens for term in terms])
    return [term._replace(token_advantages=own) for term, own in zip(terms, split, strict=True)]


def _generator(seed: int, terms: Sequence[LossTerm]) -> torch.Generator:
    """The same draw on every rank and after a resume: seeded by the tokens of the update."""
    digest = hashlib.sha256(str(seed).encode())
    for term in terms:
        digest.update(term.trajectory.token_ids.cpu().numpy().tobytes())
    return torch.Generator().manual_seed(int.from_bytes(digest.digest()[:7], "big"))
