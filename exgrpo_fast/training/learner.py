"""Groups -> advantages -> columns -> packed micro-batches -> fused loss -> optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exgrpo_fast.core.types import Group, Trajectory
from exgrpo_fast.experience.replay.weighting import moved_clip
from exgrpo_fast.model.oom import retry_smaller_on_oom
from exgrpo_fast.model.packing import (
    Aggregation,
    extent,
    fill_columns,
    pack,
    sequences_of,
    token_weights,
)
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.training.advantages import Advantage, Baseline, group_advantages
from exgrpo_fast.training.optim.gradient_release import require_one_pack
from exgrpo_fast.training.optim.optimiser import Optimiser
from exgrpo_fast.training.reference import Reference
from exgrpo_fast.training.update_stats import (
    BatchSums,
    MetricSums,
    RefusedUpdate,
    Row,
    UpdateReport,
    guided_ratio_metrics,
    guided_tokens,
    replay_ratio_metrics,
)
from exgrpo_kernels import NonFiniteHidden, PolicyObjective, linear_policy_loss


@dataclass(frozen=True)
class ReplayTerm:
    """What replayed trajectories are to the loss.

    `coef`: None = they share the normaliser of the batch; a number = they form an objective of
    their own, J_fresh + coef x J_replayed, each with its own normaliser (RePO).
    """

    baseline: Baseline = "pooled"
    coef: float | None = None


class Learner:
    """Everything between a batch of judged groups and changed weights."""

    def __init__(
        self,
        policy: Policy,
        optimiser: Optimiser,
        *,
        advantage: Advantage,
        aggregation: Aggregation,
        max_completion_tokens: int,
        minibatches: int = 1,
        mask_truncated: bool = False,
        reference: Reference | None = None,
        sparsity: str | float = "auto",
        tail: str = "drop",
        replay: ReplayTerm = ReplayTerm(),
    ) -> None:
        """`reference`: the frozen policies of the KL term, needed when its coefficient is not 0.

        `sparsity`, `tail`: those of `linear_policy_loss`.
        """
        self.policy = policy
        self.policy.sizes.halves_packs = optimiser.sums_packs
        self.optimiser = optimiser
        self.advantage = advantage
        self.aggregation: Aggregation = aggregation
        self.max_completion_tokens = max_completion_tokens
        self.minibatches = minibatches
        self.mask_truncated = mask_truncated
        self.reference = reference
        self.sparsity, self.tail = sparsity, tail
        self.replay = replay

    def update(
        self,
        groups: Sequence[Group],
        objective: PolicyObjective,
        on_tokens: Callable[[int], None] = lambda count: None,
    ) -> UpdateReport:
        """One optimiser update per minibatch of groups."""
        report = UpdateReport()
        metrics = MetricSums()
        ref_logprobs = self._reference_logprobs(groups, objective)
        for minibatch in split_evenly(groups, self.minibatches):
            self._update_once(minibatch, objective, ref_logprobs, report, metrics, on_tokens)
        if self.reference is not None:
            self.reference.finish_step(self.policy)
        if not groups:  # dynamic sampling kept none
            report.skipped["update_without_gradient"] += 1
        report.kernel_metrics = metrics.joined() | replay_ratio_metrics(report.replay_ratios)
        report.kernel_metrics |= guided_ratio_metrics(report.guided)
        report.chunk_halvings, report.microbatch_halvings = self.policy.sizes.take_halvings()
        return report

    def _reference_logprobs(
        self, groups: Sequence[Group], objective: PolicyObjective
    ) -> dict[int, Tensor] | None:
        """By the identity of the trajectory; taken once, before the weights of the step change."""
        if not objective.kl_coef:
            return None
        assert self.reference is not None, "a KL term needs a reference policy"
        trajectories = [t for group in groups for t in group.trajectories]
        if not trajectories:
            return {}
        scored = self.reference.logprobs(trajectories)
        self.reference.follow(self.policy)
        return {id(t): logprobs for t, logprobs in zip(trajectories, scored, strict=True)}

    def _update_once(
        self,
        groups: Sequence[Group],
        objective: PolicyObjective,
        ref_logprobs: dict[int, Tensor] | None,
        report: UpdateReport,
        metrics: MetricSums,
        on_tokens: Callable[[int], None],
    ) -> None:
        rows = [row for row in self.rows(groups) if carries_gradient(row, objective)]
        if not rows:
            report.skipped["update_without_gradient"] += 1
            return
        try:
            sums = self._accumulate(rows, objective, ref_logprobs, on_tokens)
        except NonFiniteHidden:
            self.optimiser.discard()
            self._refuse("update_not_finite", rows, None, report)
            return
        metrics.join(sums.metrics)
        report.tokens_trained += sums.num_tokens
        report.read.join(sums.read)
        report.replay_ratios += sums.replay_ratios
        report.guided += sums.guided
        outcome = self.optimiser.step()
        report.losses.append(sums.loss)
        report.grad_norms.append(outcome.grad_norm)
        report.lr = outcome.lr
        if outcome.skipped:
            self._refuse(outcome.skipped, rows, outcome.grad_norm, report)

    def _refuse(
        self, reason: str, rows: Sequence[Row], grad_norm: float | None, report: UpdateReport
    ) -> None:
        report.skipped[reason] += 1
        report.refused.append(RefusedUpdate(reason, rows, grad_norm))

    def _accumulate(
        self,
        rows: Sequence[Row],
        objective: PolicyObjective,
        ref_logprobs: dict[int, Tensor] | None,
        on_tokens: Callable[[int], None],
    ) -> BatchSums:
        """The gradient of the batch, in the parameters; in smaller pieces where memory runs out."""
        return retry_smaller_on_oom(
            self.policy,
            lambda: self._backward(rows, objective, ref_logprobs, on_tokens),
            lambda: extent(*sequences_of([row.trajectory for row in rows])),
            during="the update",
            undo=self.optimiser.discard,
            has_gradients=True,
        )

    def _backward(
        self,
        rows: Sequence[Row],
        objective: PolicyObjective,
        ref_logprobs: dict[int, Tensor] | None,
        on_tokens: Callable[[int], None],
    ) -> BatchSums:
        sums = BatchSums()
        with self.policy.passes():
            for loss, kernel_metrics, num_tokens in self._micro_batches(
                rows, objective, ref_logprobs, sums
            ):
                self.optimiser.backward(loss)
                sums.loss += float(loss.detach())
                sums.metrics.add(kernel_metrics)
                sums.num_tokens += num_tokens
                on_tokens(num_tokens)
        return sums.over(self.policy.processes)

    def rehearse(self, groups: Sequence[Group], objective: PolicyObjective) -> None:
        """The passes of one update and nothing of its effect: gradients are made and dropped."""
        references = None
        if objective.kl_coef and self.reference is not None:
            trajectories = [t for group in groups for t in group.trajectories]
            scored = self.reference.logprobs(trajectories)
            references = {id(t): r for t, r in zip(trajectories, scored, strict=True)}
        rows = [row for row in self.rows(groups) if carries_gradient(row, objective)]
        with self.policy.passes():
            for loss, _, _ in self._micro_batches(rows, objective, references, BatchSums()):
                self.optimiser.backward(loss)
        self.optimiser.discard()

    def rows(self, groups: Sequence[Group]) -> list[Row]:
        """Advantages and weights of all trajectories of one update batch."""
        trajectories = [t for group in groups for t in group.trajectories]
        advantages = [
            a
            for group in groups
            for a in group_advantages(
                group.rewards,
                group.replayed,
                advantage=self.advantage,
                baseline=self.replay.baseline,
                weights=group.baseline_weights,
            )
        ]
        weights = self._weights(trajectories)
        return [Row(t, a, w) for t, a, w in zip(trajectories, advantages, weights, strict=True)]

    def _weights(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """Mask x loss normaliser of each."""
        coef = self.replay.coef
        if coef is None:
            weight_of = self._normaliser(trajectories)
            weights = [weight_of(t.num_tokens) for t in trajectories]
        else:
            parts = [
                [t for t in trajectories if (t.source == "replay") == old] for old in (False, True)
            ]
            fresh, replayed = (self._normaliser(part) for part in parts)
            weights = [
                coef * replayed(t.num_tokens) if t.source == "replay" else fresh(t.num_tokens)
                for t in trajectories
            ]
        return [
            0.0 if t.masked or (t.truncated and self.mask_truncated) else w
            for t, w in zip(trajectories, weights, strict=True)
        ]

    def _normaliser(self, trajectories: Sequence[Trajectory]) -> Callable[[int], float]:
        counted = [t for t in trajectories if not t.masked]
        return token_weights(
            self.aggregation,
            num_sequences=len(counted),
            num_tokens=sum(t.num_tokens for t in counted),
            max_completion_tokens=self.max_completion_tokens,
        )

    def _micro_batches(
        self,
        rows: Sequence[Row],
        objective: PolicyObjective,
        ref_logprobs: dict[int, Tensor] | None,
        sums: BatchSums,
    ) -> Iterator[tuple[Tensor, dict[str, Tensor], int]]:
        """(differentiable loss, kernel metrics, tokens) of one micro-batch after the other.

        The ratios of replayed and of prior-guided tokens are added to the sums.
        """
        trajectories = [row.trajectory for row in rows]
        replayed = [trajectory.source == "replay" for trajectory in trajectories]
        guided = [trajectory.guidance is not None for trajectory in trajectories]
        prompts, responses = sequences_of(trajectories)
        references = None
        if ref_logprobs is not None:
            references = [ref_logprobs[id(t)] for t in trajectories]
        terms = [token_terms(row, objective) for row in rows]
        limit = self.policy.max_tokens_per_microbatch
        packs = pack(prompts, responses, max_tokens=limit, device=self.policy.device)
        if not self.optimiser.sums_packs:
            require_one_pack(len(packs), limit)
        for packed, counts in self.policy.assign_packs(packs):
            columns = fill_columns(
                packed,
                trajectories,
                behaviour_logprobs=[logprobs for logprobs, _ in terms],
                advantages=[advantages for _, advantages in terms],
                weights=[row.weight if counts else 0.0 for row in rows],
                ref_logprobs=references,
            )
            hidden_ND = self.policy.hidden_states(packed)
            weight, bias, softcap = self.policy.head_for(hidden_ND)
            with self.policy.head_gradient() as head_gradient_VD:
                result = linear_policy_loss(
                    hidden_ND,
                    weight,
                    columns.targets,
                    advantages=columns.advantages,
                    behaviour_logprobs=columns.behaviour_logprobs,
                    weights=columns.weights,
                    shaping=columns.shaping,
                    ref_logprobs=columns.ref_logprobs,
                    sequence_ids=columns.sequence_ids,
                    objective=objective,
                    weight_main_grad=head_gradient_VD,
                    bias=bias,
                    temperature=self.policy.temperature,
                    softcap=softcap,
                    sparsity=self.sparsity,
                    tail=self.tail,
                    chunk_rows=self.policy.sizes.chunk_rows,
                )
            del hidden_ND, weight, head_gradient_VD  # the backward pass does without them
            if not counts:
                yield result.loss, {}, 0
                continue
            sums.read.add(packed)
            sums.replay_ratios.append(result.ratio[packed.rows_of(replayed)])
            if any(guided):
                sums.guided.append(
                    guided_tokens(packed, trajectories, columns, result.ratio, objective)
                )
            yield result.loss, result.metrics, columns.num_tokens

    # --- persistence ---

    def state_dict(self) -> dict[str, Any]:
        reference = self.reference.state_dict() if self.reference else {}
        return {
            "optimiser": self.optimiser.state_dict(),
            "reference": reference,
            **self.policy.sizes.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.optimiser.load_state_dict(state["optimiser"])
        self.policy.sizes.load_state_dict(state)
        if self.reference and state["reference"]:
            self.reference.load_state_dict(state["reference"])


def token_terms(row: Row, objective: PolicyObjective) -> tuple[Tensor, Tensor]:
    """(denominators [T], advantages [T]) of one row."""
    trajectory = row.trajectory
    behaviour, proximal = trajectory.behaviour_logprobs, trajectory.proximal_logprobs
    if proximal is None:
        return behaviour, torch.full_like(behaviour, row.advantage)
    moved = moved_clip(behaviour, proximal, row.advantage, objective)
    return moved.behaviour_logprobs, row.advantage * moved.factors


def carries_gradient(row: Row, objective: PolicyObjective) -> bool:
    """Rows that cannot move the weights are not even forwarded; they stay in every denominator."""
    has_term = row.advantage != 0.0 or objective.kl_coef != 0.0 or objective.entropy_coef != 0.0
    return row.weight != 0.0 and has_term


def split_evenly(groups: Sequence[Group], parts: int) -> list[Sequence[Group]]:
    """Parts whose sizes differ by at most one; never an empty one.

    Every `parts`-th group: the replayed ones stand first in a batch, and each part gets its share.
    """
    return [part for start in range(parts) if (part := groups[start::parts])]
