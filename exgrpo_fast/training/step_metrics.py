"""One step's groups, update and clock -> one line of metrics.jsonl."""

from __future__ import annotations

import resource
import struct
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch

from exgrpo_fast.core.types import Group, Trajectory, pass_at_1
from exgrpo_fast.experience.prior.guidance_metrics import guidance_metrics
from exgrpo_fast.training.collector import Batch, PhaseTimer
from exgrpo_fast.training.update_stats import UpdateReport


def step_metrics(
    step: int, batch: Batch, update: UpdateReport, clock: PhaseTimer
) -> dict[str, Any]:
    """The keys that other tools rely on come first; None where there is nothing to average."""
    everything = [t for group in batch.generated for t in group.trajectories]
    fresh = [t for t in everything if t.source == "fresh"]
    replayed = [t for t in everything if t.source == "replay"]
    with_replay = [
        t for g in batch.groups if g.from_source("replay") for t in g.from_source("fresh")
    ]
    tokens_generated = sum(t.num_tokens for t in fresh)
    seconds = clock.seconds
    reasons = Counter(t.verdict.reason for t in everything if t.verdict) + update.skipped
    return {
        "step": step,
        "loss": update.loss,
        "loss_hex": float32_hex(update.loss),
        "reward_mean": fmean(t.reward for t in everything),
        "pass_at_1": pass_at_1(batch.generated),
        "entropy": token_mean_entropy(fresh),
        "learnable_frac": fmean(group.learnable for group in batch.generated),
        "replay_size": 0,
        "replay_frac": len(replayed) / len(batch.generated),
        "completion_len_mean": fmean(t.num_tokens for t in fresh),
        "tokens_generated": tokens_generated,
        "tokens_trained": update.tokens_trained,
        "step_seconds": sum(seconds.values()),
        "unscored": batch.num_unscored,
        "skipped": sum(update.skipped.values()),
        "reasons": dict(reasons),
        "pass_at_1_fresh": fmean(t.successful for t in fresh),
        "pass_at_1_replay_groups": fmean(t.successful for t in with_replay)
        if with_replay
        else None,
        "all_fail_frac": fmean(group.num_successes == 0 for group in batch.generated),
        "all_pass_frac": fmean(
            group.num_successes == len(group.trajectories) for group in batch.generated
        ),
        "groups_discarded": len(batch.discarded),
        "truncated_frac": fmean(t.truncated for t in fresh),
        "entropy_fresh": token_mean_entropy(fresh),
        "entropy_replay": token_mean_entropy(replayed),
        "completion_len_replay": fmean(t.num_tokens for t in replayed) if replayed else None,
        **asdict(batch.mismatch),
        "grad_norm": max(update.grad_norms, default=None),
        "lr": update.lr,
        **update.sums.read_metrics(),
        "chunk_halvings": update.chunk_halvings,
        "microbatch_halvings": update.microbatch_halvings,
        **(batch.hindsight.metrics() if batch.hindsight else {}),
        **guidance_metrics(batch.generated, batch.guidance),
        **update.kernel_metrics,
        **{f"seconds_{phase}": value for phase, value in seconds.items()},
        "tokens_per_second_rollout": tokens_generated / max(seconds.get("rollout", 0.0), 1e-9),
        "tokens_per_second_train": update.tokens_trained / max(seconds.get("update", 0.0), 1e-9),
    }


def peak_memory_gib(device: torch.device) -> float:
    """GiB: the most the CUDA allocator has held at once, elsewhere the process's resident peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes there, KiB elsewhere


def float32_hex(value: float) -> str:
    """`float.hex` of the value rounded to float32: equal strings mean equal bits."""
    return struct.unpack("f", struct.pack("f", value))[0].hex()


def token_mean_entropy(trajectories: Sequence[Trajectory]) -> float | None:
    """Mean over tokens of the full-vocabulary entropy, in nats."""
    if not trajectories:
        return None
    return float(torch.cat([t.entropies for t in trajectories]).mean())


def completion_rows(
    step: int, groups: Sequence[Group], decode: Callable[[Sequence[int]], str]
) -> list[dict[str, Any]]:
    """The completion table of one step."""
    return [
        {
            "step": step,
            "question_id": t.question.id,
            "source": t.source,
            "prompt": t.question.prompt,
            "completion": decode(t.token_ids.tolist()),
            "answer": t.question.answer,
            "reward": t.reward,
            "reason": t.verdict.reason if t.verdict else "",
            "num_tokens": t.num_tokens,
            "truncated": t.truncated,
            "advantage": advantage,
            "mean_entropy": float(t.entropies.mean()),
            "mean_logprob": float(t.behaviour_logprobs.mean()),
        }
        for group in groups
        for t, advantage in zip(group.trajectories, group.advantages, strict=True)
    ]
