"""Groups with advantages -> packs -> fused loss -> optimiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

import torch

from exgrpo_fast.core.rng import seeded_by
from exgrpo_fast.core.types import Group
from exgrpo_fast.model.oom import retry_smaller_on_oom
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.training.batch import TrainingPack, UpdateBatch, WeightRule
from exgrpo_fast.training.distillation import VocabularyDistillation
from exgrpo_fast.training.optim.optimiser import Optimiser
from exgrpo_fast.training.reference import BehaviourReference, Reference
from exgrpo_fast.training.token_advantages import Rule, apply_rules
from exgrpo_fast.training.update_stats import UnreadSums, UpdateReport
from exgrpo_kernels import NonFiniteHidden, PolicyLoss, PolicyObjective, linear_policy_loss


@dataclass(eq=False)
class Learner:
    """Updates the policy on a batch of groups.

    `token_rules`: give single tokens of an update their own advantages, in this order.
    `reference`: the frozen policies of the KL term, needed when its coefficient is not 0.
    `distillation`: a divergence to a teacher beside the objective; None: none.
    `sparsity`, `tail`: those of `linear_policy_loss`.
    """

    policy: Policy
    optimiser: Optimiser
    _: KW_ONLY
    weights: WeightRule
    token_rules: Sequence[Rule] = ()
    minibatches: int = 1
    reference: Reference | BehaviourReference | None = None
    distillation: VocabularyDistillation | None = None
    sparsity: str | float = "auto"
    tail: str = "drop"

    def __post_init__(self) -> None:
        self.policy.sizes.one_pack = not self.optimiser.sums_packs

    def update(
        self,
        groups: Sequence[Group],
        objective: PolicyObjective,
        on_tokens: Callable[[int], None] = lambda count: None,
    ) -> UpdateReport:
        """One optimiser update for each minibatch of groups."""
        report = UpdateReport()
        if objective.kl_coef and groups:
            assert self.reference is not None, "a KL term needs a reference policy"
            groups = self.reference.score(groups)  # before the weights of the step change
            self.reference.follow(self.policy)
        for minibatch in split_evenly(groups, self.minibatches):
            batch = self._batch_of(minibatch, objective)
            self._update_once(batch, report, on_tokens)
        if self.reference is not None:
            self.reference.finish_step(self.policy)
        if not groups:  # dynamic sampling kept none
            report.skipped["update_without_gradient"] += 1
        report.chunk_halvings, report.microbatch_halvings = self.policy.sizes.take_halvings()
        return report

    def _batch_of(self, groups: Sequence[Group], objective: PolicyObjective) -> UpdateBatch:
        rules = partial(apply_rules, self.token_rules)
        distils = self.distillation is not None
        return UpdateBatch.of(groups, self.weights, objective, rules, all_carry_gradient=distils)

    def _update_once(
        self, batch: UpdateBatch, report: UpdateReport, on_tokens: Callable[[int], None]
    ) -> None:
        if not batch.terms:
            report.skipped["update_without_gradient"] += 1
            return
        try:
            unread = retry_smaller_on_oom(
                self.policy,
                lambda: self._backward(batch, on_tokens),
                batch.extent,
                during="the update",
                undo=self.optimiser.discard,
                has_gradients=True,
            )
        except NonFiniteHidden:
            self.optimiser.discard()
            report.refuse("update_not_finite", batch, None)
            return
        outcome = self.optimiser.step()  # waits for the gradient's norm; the rest is there then
        report.add(unread.read(batch.objective).over(self.policy.processes), outcome)
        if outcome.skipped:
            report.refuse(outcome.skipped, batch, outcome.grad_norm)

    def _backward(
        self, batch: UpdateBatch, on_tokens: Callable[[int], None] = lambda count: None
    ) -> UnreadSums:
        """Leaves the gradient of the batch in the parameters; the figures of its packs."""
        unread = UnreadSums()
        teacher = self.distillation.passes() if self.distillation else nullcontext()
        with self.policy.passes(), teacher:
            for part in batch.packs(self.policy, at_most_one=not self.optimiser.sums_packs):
                result = self._loss(part, batch.objective)
                self.optimiser.backward(result.loss)
                if part.counts:
                    unread.add(part, result)
                    on_tokens(part.columns.num_tokens)
        unread.send()
        return unread

    def _loss(self, part: TrainingPack, objective: PolicyObjective) -> PolicyLoss:
        """Hidden states and head are not kept here: the backward pass does without them.

        Dropout is drawn from the seed of the run, the update and the pack: any rank that has the
        pack, and a run that is resumed, drop the same.
        """
        columns, distillation = part.columns, self.distillation
        teacher_hidden_NE = distillation.hidden_states(part.pack) if distillation else None
        of_pack = (torch.initial_seed(), self.optimiser.num_updates, part.pack.index[0])
        with seeded_by(*of_pack, device=self.policy.device):
            hidden_ND = self.policy.hidden_states(part.pack)
        weight, bias, softcap = self.policy.head_for(hidden_ND)
        with self.policy.head_gradient() as head_gradient_VD:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self._has_slope(objective)):
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
                    kl_weights=columns.kl_weights,
                    kept_ids=columns.kept_ids,
                    objective=objective,
                    weight_main_grad=head_gradient_VD,
                    bias=bias,
                    temperature=self.policy.temperature,
                    softcap=softcap,
                    sparsity=self.sparsity,
                    tail=self.tail,
                    chunk_rows=self.policy.sizes.chunk_rows,
                )
            if distillation is None or teacher_hidden_NE is None:
                return result
            return distillation.add(
                result,
                hidden_ND,
                weight,
                teacher_hidden_NE,
                weights=columns.weights,
                weight_main_grad=head_gradient_VD,
                chunk_rows=self.policy.sizes.chunk_rows,
            )

    def _has_slope(self, objective: PolicyObjective) -> bool:
        """False where distillation is all there is: of the policy loss only metrics are needed then."""
        is_alone = self.distillation is not None and not self.distillation.with_rewards
        return not is_alone or objective.kl_coef != 0.0 or objective.entropy_coef != 0.0

    def rehearse(self, groups: Sequence[Group], objective: PolicyObjective) -> None:
        """The passes of one update without its step: gradients are computed and dropped."""
        if objective.kl_coef and self.reference is not None:
            groups = self.reference.score(groups)
        batch = self._batch_of(groups, objective)
        self.policy.all_or_none(lambda: self._backward(batch))
        self.optimiser.discard()

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


def split_evenly(groups: Sequence[Group], parts: int) -> list[Sequence[Group]]:
    """Parts whose sizes differ by at most one; never an empty one.

    Every `parts`-th group: the replayed ones come first in a batch, and each part gets its share.
    """
    return [part for start in range(parts) if (part := groups[start::parts])]
