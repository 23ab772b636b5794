"""The groups of one optimiser update -> the packs it reads, each with its columns.

    groups -> LossTerm (trajectory, advantage, weight) -> those with a gradient -> TrainingPack

Legend of shapes
    T   tokens of one completion
    N   completion tokens of one pack, the rows of the loss
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.core.packs import tokens_of_share
from exgrpo_fast.core.transfer import on_host, to_device
from exgrpo_fast.core.types import Group, TokenColumns, Trajectory
from exgrpo_fast.experience.replay.weighting import moved_clip
from exgrpo_fast.model.oom import Extent
from exgrpo_fast.model.packing import Pack, extent, kept_sets, pack, padded_ids, sequences_of
from exgrpo_fast.model.policy import Policy
from exgrpo_kernels import PolicyObjective

Aggregation = Literal["token_mean", "sequence_mean", "constant"]


class LossTerm(NamedTuple):
    """One trajectory with its advantage and the weight of each of its tokens."""

    trajectory: Trajectory
    advantage: float
    weight: float  # mask x loss normaliser
    token_advantages: Tensor | None = None  # float32 [T]; None: `advantage` on every token
    kl_weights: Tensor | None = None  # float32 [T], of the KL term; None: 1 on every token

    @property
    def advantages_T(self) -> Tensor:
        if self.token_advantages is not None:
            return self.token_advantages
        return torch.full((self.trajectory.num_tokens,), self.advantage)


# --- weights --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightRule:
    """How much the tokens of each trajectory of an update weigh.

    `mask_truncated`: truncated trajectories weigh nothing, and stay in the denominators.
    `replay_coef`: None = replayed trajectories share the normaliser of the update; a number = they
    form an objective of their own, J_fresh + coef x J_replayed, each with its own normaliser (RePO).
    """

    aggregation: Aggregation
    max_completion_tokens: int
    mask_truncated: bool = False
    replay_coef: float | None = None

    def terms(self, groups: Sequence[Group]) -> list[LossTerm]:
        """One for each trajectory of one update, those without a gradient included."""
        trajectories = [t for group in groups for t in group.trajectories]
        advantages = [a for group in groups for a in group.advantages]
        weights = self._weights(trajectories)
        return [LossTerm(*term) for term in zip(trajectories, advantages, weights, strict=True)]

    def _weights(self, trajectories: Sequence[Trajectory]) -> list[float]:
        apart = [self.replay_coef is not None and t.source == "replay" for t in trajectories]
        shared, own = (
            self._normaliser([t for t, a in zip(trajectories, apart, strict=True) if a is side])
            for side in (False, True)
        )
        coef = self.replay_coef or 0.0
        return [
            0.0
            if t.masked or (t.truncated and self.mask_truncated)
            else (coef * own(t.num_tokens) if a else shared(t.num_tokens))
            for t, a in zip(trajectories, apart, strict=True)
        ]

    def _normaliser(self, trajectories: Sequence[Trajectory]) -> Callable[[int], float]:
        counted = [t for t in trajectories if not t.masked]
        return token_weights(
            self.aggregation,
            num_sequences=len(counted),
            num_tokens=sum(t.num_tokens for t in counted),
            max_completion_tokens=self.max_completion_tokens,
        )


def token_weights(
    aggregation: Aggregation, *, num_sequences: int, num_tokens: int, max_completion_tokens: int
) -> Callable[[int], float]:
    """length of a trajectory -> the weight of each of its tokens.

    token_mean     1 / tokens of the update batch                     DAPO, arXiv 2503.14476 eq. 8
    sequence_mean  1 / (sequences x own length)                       GRPO, arXiv 2402.03300 eq. 3
    constant       1 / (sequences x max_completion_tokens)            Dr.GRPO, arXiv 2503.20783

    `num_sequences` counts every trajectory of the update batch but the masked ones, also those
    without a gradient, and `num_tokens` their tokens; so neither micro-batches nor skipped rows
    change the loss.
    """
    if aggregation == "token_mean":
        return lambda length: 1.0 / max(num_tokens, 1)
    if aggregation == "sequence_mean":
        return lambda length: 1.0 / (num_sequences * length)
    return lambda length: 1.0 / (num_sequences * max_completion_tokens)


# --- packs ----------------------------------------------------------------------------------------


class SeveralPacks(UserError):
    """An update that does not go into one pack on each rank; it has changed nothing."""


class TrainingPack(NamedTuple):
    """All that one forward and backward pass needs."""

    pack: Pack
    terms: Sequence[LossTerm]  # of its sequences, in the order in which they are read
    columns: TokenColumns
    counts: bool  # False: a dummy pass, see AssignedPack


@dataclass(frozen=True)
class UpdateBatch:
    """The trajectories that move the weights in one optimiser update."""

    terms: Sequence[LossTerm]
    objective: PolicyObjective

    @staticmethod
    def of(
        groups: Sequence[Group],
        rule: WeightRule,
        objective: PolicyObjective,
        change_terms: Callable[[list[LossTerm]], list[LossTerm]] = lambda terms: terms,
        *,
        all_carry_gradient: bool = False,
    ) -> UpdateBatch:
        """`change_terms`: gives single tokens their own advantages; sees all terms.
        `all_carry_gradient`: every term with a weight, whatever its advantage."""
        terms = change_terms(rule.terms(groups))
        if all_carry_gradient:
            return UpdateBatch([t for t in terms if t.weight != 0.0], objective)
        return UpdateBatch([t for t in terms if carries_gradient(t, objective)], objective)

    def extent(self) -> Extent:
        return extent(*sequences_of([term.trajectory for term in self.terms]))

    def packs(self, policy: Policy, *, at_most_one: bool = False) -> Iterator[TrainingPack]:
        """This rank's packs; the columns of each go to the device when it is its turn.

        `at_most_one`: as even as they come; SeveralPacks where there would be more than one a rank.
        """
        limit, ranks = policy.max_tokens_per_microbatch, policy.processes.count
        sequences = sequences_of([term.trajectory for term in self.terms])
        if at_most_one:
            longest, total = extent(*sequences)
            limit = min(limit, tokens_of_share(total, longest, ranks))
        packs = pack(*sequences, max_tokens=limit, device=policy.device)
        if at_most_one and len(packs) > ranks:
            most = "one" if ranks == 1 else f"{ranks}, one on each rank"
            raise SeveralPacks(
                f"train.gradient_release: an update came to {len(packs)} packs of at most {limit} "
                f"tokens, and can only be {most}; raise train.max_tokens_per_microbatch or "
                f"train.minibatches"
            )
        for packed, counts in policy.assign_packs(packs):
            terms = [self.terms[i] for i in packed.index]
            yield TrainingPack(packed, terms, self._columns(packed, terms, counts), counts)

    def _columns(self, packed: Pack, terms: Sequence[LossTerm], counts: bool) -> TokenColumns:
        """Made on the CPU and sent in one copy. The ids stay there: they decide how sequences are put
        into chunks."""
        device = packed.targets.device
        lengths = torch.tensor(packed.lengths)
        trajectories = [term.trajectory for term in terms]

        def spread(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32).repeat_interleave(lengths)

        def join(values: Iterable[Tensor]) -> Tensor:
            return torch.cat([value.cpu() for value in values]).float()

        weights_N = spread([term.weight if counts else 0.0 for term in terms])
        if any(t.token_weights is not None for t in trajectories):
            weights_N = weights_N * join(or_ones(t.token_weights, t) for t in trajectories)
        ratio_columns = [ratio_columns_of(term, self.objective) for term in terms]
        references = [t.ref_logprobs for t in trajectories if t.ref_logprobs is not None]
        columns = {
            "behaviour_logprobs": join(logprobs for logprobs, _ in ratio_columns),
            "advantages": join(advantages for _, advantages in ratio_columns),
            "weights": weights_N,
            "shaping": spread([t.shaping for t in trajectories]),
        }
        if references:
            columns["ref_logprobs"] = join(references)
        if any(term.kl_weights is not None for term in terms):
            columns["kl_weights"] = join(or_ones(t.kl_weights, t.trajectory) for t in terms)
        moved = dict(zip(columns, to_device(list(columns.values()), device), strict=True))
        kept = kept_sets(trajectories)
        if kept is not None:
            (moved["kept_ids"],) = to_device([padded_ids(kept)], device)
        ids = on_host(torch.arange(len(terms)).repeat_interleave(lengths), device)
        return TokenColumns(targets=packed.targets, sequence_ids=ids, **moved)


def carries_gradient(term: LossTerm, objective: PolicyObjective) -> bool:
    """Trajectories that cannot move the weights are not even read; they stay in every denominator."""
    if term.weight == 0.0:
        return False
    has_term = objective.kl_coef != 0.0 or objective.entropy_coef != 0.0
    if term.token_advantages is not None:
        return has_term or bool(term.token_advantages.any())
    return has_term or term.advantage != 0.0


def ratio_columns_of(term: LossTerm, objective: PolicyObjective) -> tuple[Tensor, Tensor]:
    """(denominators of the ratio [T], advantages [T]) of one trajectory."""
    behaviour, proximal = term.trajectory.behaviour_logprobs, term.trajectory.proximal_logprobs
    if proximal is None:
        return behaviour, term.advantages_T
    moved = moved_clip(behaviour, proximal, term.advantage, objective)
    return moved.behaviour_logprobs, term.advantages_T.to(moved.factors.device) * moved.factors


def or_ones(factors_T: Tensor | None, trajectory: Trajectory) -> Tensor:
    """float32 [T]: `factors_T`, or ones."""
    return torch.ones(trajectory.num_tokens) if factors_T is None else factors_T
