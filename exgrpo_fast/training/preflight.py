"""The worst step a run can bring, rehearsed before the first one.

Completions of the greatest length behind one prompt, two full packs of them for each rank (one where
an update must be a single pack): what would run out of memory at step 120 does so in the first
minute. No update is made: weights, moments and random state stay the same bit for bit. Before the
first update a placeholder takes the room of the optimiser's moments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.core.types import Group, Question, Trajectory, Verdict
from exgrpo_fast.model.packing import sequences_of
from exgrpo_fast.training.learner import Learner
from exgrpo_fast.training.step_metrics import peak_memory_gib
from exgrpo_kernels import PolicyObjective


class DoesNotFit(UserError):
    """The device ran out of memory in the rehearsal."""


@dataclass(frozen=True)
class Rehearsal:
    """Peak of the process so far, on a GPU as torch allocated it, in GiB."""

    peak_gib: float
    sequences: int
    tokens: int  # of each

    def note(self, planned_bytes: float | None = None) -> str:
        planned = f", planned {planned_bytes / 2**30:.2f}" if planned_bytes is not None else ""
        return (
            f"preflight: {self.sequences} completions at their longest ({self.tokens} tokens with "
            f"the prompt), peak {self.peak_gib:.2f} GiB{planned}"
        )


def rehearse(
    learner: Learner,
    objective: PolicyObjective,
    *,
    prompt_tokens: int,
    completion_tokens: int,
    state_bytes: float,
    processes: int = 1,
) -> Rehearsal:
    """Score and train on the worst case. DoesNotFit where the device is too small.

    `state_bytes`: of this process's optimiser, once it has made its first update; `processes`: all
    of which call this.
    """
    policy = learner.policy
    length = prompt_tokens + completion_tokens - 1  # the last token is not read
    room = policy.max_tokens_per_microbatch - prompt_tokens
    packs = 2 if learner.optimiser.sums_packs else 1
    sequences = processes * packs * max(1, room // max(1, completion_tokens - 1))
    groups = worst_groups(
        1,
        sequences,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        vocabulary=policy.head.weight.shape[0],
    )
    is_new = not learner.optimiser.adamw.state
    devices = [policy.device] if policy.device.type == "cuda" else []
    if devices:
        torch.cuda.reset_peak_memory_stats(policy.device)
    try:
        with torch.random.fork_rng(devices=devices), policy.sizes.fixed():
            placeholder = torch.empty(
                int(state_bytes) if is_new else 0, dtype=torch.uint8, device=policy.device
            )
            trajectories = [t for group in groups for t in group.trajectories]
            policy.score(*sequences_of(trajectories))
            learner.rehearse(groups, objective)
            del placeholder
    except torch.OutOfMemoryError as error:
        learner.optimiser.discard()
        raise DoesNotFit(
            f"preflight: {sequences} completions of {completion_tokens} tokens do not fit "
            f"({str(error).partition('.')[0]}); `exgrpo-fast train ... --dry-run` shows the plan, "
            f"and a smaller train.max_tokens_per_microbatch needs less"
        ) from None
    peak = peak_memory_gib(policy.device)
    if devices:
        torch.cuda.empty_cache()
    return Rehearsal(peak, sequences, length)


def worst_groups(
    num_groups: int,
    group_size: int,
    *,
    prompt_tokens: int,
    completion_tokens: int,
    vocabulary: int,
) -> list[Group]:
    """Correct and incorrect completions in turn, of random tokens and the greatest length."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> torch.Tensor:
        return torch.randint(vocabulary, (count,), generator=generator)

    groups = []
    for number in range(num_groups):
        question = Question(f"preflight {number}", tuple(draw(prompt_tokens).tolist()), "", "")
        completions = tuple(
            Trajectory(
                question,
                token_ids=draw(completion_tokens),
                behaviour_logprobs=torch.full((completion_tokens,), -1.0),
                entropies=torch.zeros(completion_tokens),
                truncated=False,
                verdict=Verdict(float(place % 2 == 0)),
            )
            for place in range(group_size)
        )
        advantages = [0.5 if place % 2 == 0 else -0.5 for place in range(group_size)]
        groups.append(Group(question, completions, tuple(advantages)))
    return groups
