"""The frozen policies that a KL term holds the trained one to.

    base        the initial policy; from `rebase_at_step` on, the policy of that step. Of a policy
                with adapters it needs no copy: it is the same model with the adapters off
    previous    the policy at the start of the preceding step

With share s of the previous one, the log-probability handed to the loss is
(1 - s) log base + s log previous. For the estimators k1 and k2 its gradient is exactly that of
(1 - s) KL(pi || base) + s KL(pi || previous), ReMix's KL-convex term (arXiv 2507.06892, section
3.2): for k2, (1 - s) d1^2 + s d2^2 and ((1 - s) d1 + s d2)^2 differ by s (1 - s) (d1 - d2)^2, in
which the trained policy cancels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from exgrpo_fast.core.dtensor import shard_like
from exgrpo_fast.core.types import Group, Trajectory
from exgrpo_fast.model.lora import switched_off
from exgrpo_fast.model.packing import Ragged, kept_sets, sequences_of
from exgrpo_fast.model.policy import Policy, Scores


@dataclass(frozen=True)
class AdapterOff:
    """The model under a policy's adapters: its initial policy."""

    policy: Policy

    def score(self, prompts: Ragged, completions: Ragged, *, kept: Ragged | None = None) -> Scores:
        with switched_off(self.policy.model):
            return self.policy.score(prompts, completions, kept=kept)


class Reference:
    """Log-probs of the frozen policies; `follow` and `finish_step` keep them up to date."""

    def __init__(
        self,
        base: Policy | AdapterOff,
        previous: Policy | None = None,
        *,
        previous_share: float = 0.0,
        rebase_at_step: int | None = None,
    ) -> None:
        """`previous` starts as a second copy of the initial policy; needed for a share above 0.
        Policies are copies with plain weights; a base that is replaced cannot be an AdapterOff."""
        assert previous is not None or previous_share == 0.0
        self.base, self.previous = base, previous
        self.previous_share = previous_share
        self.rebase_at_step = rebase_at_step
        self.num_steps = 0
        for policy in (base, previous):
            if isinstance(policy, Policy):
                policy.freeze()

    def score(self, groups: Sequence[Group]) -> list[Group]:
        """The same groups, their trajectories with `ref_logprobs`."""
        scored = iter(self.logprobs([t for group in groups for t in group.trajectories]))

        def with_reference(trajectory: Trajectory) -> Trajectory:
            return replace(trajectory, ref_logprobs=next(scored))

        return [replace(g, trajectories=tuple(map(with_reference, g.trajectories))) for g in groups]

    def logprobs(self, trajectories: Sequence[Trajectory]) -> list[Tensor]:
        """float32 [T] of each, on the CPU; over the set that a token was drawn from, if any."""
        prompts, completions = sequences_of(trajectories)
        kept = kept_sets(trajectories)
        mixed = self.base.score(prompts, completions, kept=kept).logprobs
        if self.previous is not None:
            others = self.previous.score(prompts, completions, kept=kept).logprobs
            mixed = mixed.lerp(others, self.previous_share)
        return list(Ragged(mixed.cpu(), completions.lengths).split())

    def follow(self, policy: Policy) -> None:
        """Before the weights of this step change: they are the previous ones of the next."""
        if self.previous is not None:
            copy_weights(policy, self.previous)

    def finish_step(self, policy: Policy) -> None:
        self.num_steps += 1
        if self.num_steps == self.rebase_at_step:
            assert isinstance(self.base, Policy)
            copy_weights(policy, self.base)

    # --- persistence ---

    def state_dict(self) -> dict[str, Any]:
        """What cannot be read from the initial model's folder again."""
        state: dict[str, Any] = {"num_steps": self.num_steps}
        if self.previous is not None:
            state["previous"] = dict(self.previous.model.named_parameters())
        is_rebased = self.rebase_at_step is not None and self.num_steps >= self.rebase_at_step
        if is_rebased and isinstance(self.base, Policy):
            state["base"] = dict(self.base.model.named_parameters())
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_steps = state["num_steps"]
        for policy, name in ((self.previous, "previous"), (self.base, "base")):
            if isinstance(policy, Policy) and name in state:
                copy_tensors(state[name].items(), policy)


class BehaviourReference:
    """A KL term towards the policy that produced each token: its log-probs are there already."""

    def score(self, groups: Sequence[Group]) -> list[Group]:
        """The same groups, `behaviour_logprobs` as their `ref_logprobs`."""

        def with_own(trajectory: Trajectory) -> Trajectory:
            return replace(trajectory, ref_logprobs=trajectory.behaviour_logprobs)

        return [replace(g, trajectories=tuple(map(with_own, g.trajectories))) for g in groups]

    def follow(self, policy: Policy) -> None:
        """Nothing is kept."""

    def finish_step(self, policy: Policy) -> None:
        """Nothing is kept."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing was saved."""


def copy_weights(source: Policy, target: Policy) -> None:
    """Of a sharded policy: a collective of all ranks."""
    copy_tensors(source.named_weights(), target)


@torch.no_grad()
def copy_tensors(weights: Iterable[tuple[str, Tensor]], target: Policy) -> None:
    """Whole tensors, or shards that were read for as many ranks as `target` has."""
    ours = target.model.state_dict()
    for name, weight in weights:
        ours[name].copy_(shard_like(weight, ours[name]))
