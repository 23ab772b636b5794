"""What an update saw: rows that were refused, sums over micro-batches, ratios of old tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from exgrpo_fast.core.process_group import Processes
from exgrpo_fast.core.types import TokenColumns, Trajectory
from exgrpo_fast.model.packing import Pack
from exgrpo_kernels import PolicyObjective


@dataclass(frozen=True)
class Row:
    """One trajectory with what the group made of it."""

    trajectory: Trajectory
    advantage: float
    weight: float  # of each of its tokens: mask x loss normaliser


@dataclass(frozen=True)
class RefusedUpdate:
    """An update that left the weights alone because its numbers are broken."""

    reason: str
    rows: Sequence[Row]
    grad_norm: float | None  # None: already the forward was not finite


class GuidedTokens(NamedTuple):
    """Of the prior-guided tokens of a micro-batch."""

    ratios: Tensor
    redrawn: Tensor  # bool
    clipped: Tensor  # bool


@dataclass
class TokensRead:
    """What the forward passes of an update read."""

    forwarded: int = 0  # input tokens, padding included
    prompts: int = 0  # of them prompt tokens
    responses: int = 0  # and response tokens
    prompts_shared: int = 0  # prompt tokens more, had every response read its own

    def add(self, packed: Pack) -> None:
        layout = packed.layout
        prompts = int(layout.prompt_lengths.sum())
        self.join(
            TokensRead(
                forwarded=packed.input_ids.numel(),
                prompts=prompts,
                responses=int(layout.response_lengths.sum()),
                prompts_shared=int(layout.prompt_lengths[layout.prompt_of].sum()) - prompts,
            )
        )

    def join(self, other: TokensRead) -> None:
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)

    def metrics(self) -> dict[str, float | None]:
        """None where nothing was read."""
        padding = self.forwarded - self.prompts - self.responses
        prompts = self.prompts + self.prompts_shared
        return {
            "padding_frac": padding / self.forwarded if self.forwarded else None,
            "prompt_tokens_shared_frac": self.prompts_shared / prompts if prompts else None,
        }


@dataclass
class UpdateReport:
    """Means over the optimiser updates of one step."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    lr: float = 0.0
    tokens_trained: int = 0
    read: TokensRead = field(default_factory=TokensRead)
    skipped: Counter[str] = field(default_factory=Counter)
    kernel_metrics: dict[str, float | None] = field(default_factory=dict)
    replay_ratios: list[Tensor] = field(default_factory=list)  # of replayed tokens, per micro-batch
    guided: list[GuidedTokens] = field(default_factory=list)  # per micro-batch
    refused: list[RefusedUpdate] = field(default_factory=list)
    # times that memory ran out, in scoring or in the update, and the pass was done again
    chunk_halvings: int = 0
    microbatch_halvings: int = 0

    @property
    def loss(self) -> float:
        return sum(self.losses) / len(self.losses) if self.losses else 0.0


class MetricSums:
    """Joins the kernels' metrics over micro-batches: *_max by maximum, counts by sum, and the rest
    by the mean over the rows that each is a mean of."""

    OVER_SHAPED_ROWS = {"shaped_mean"}
    OVER_TRAINED_ROWS = {"entropy_mean", "kl_ref", "density", "skipped_mass"}
    COUNTS = {"num_trained", "num_shaped", "log_ratio_clamped", "rows_skipped"}

    def __init__(
        self, sums: Mapping[str, float] | None = None, rows: Mapping[str, float] | None = None
    ) -> None:
        self.sums = dict(sums or {})
        self.rows = dict(rows or {})

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Copies all figures of one micro-batch, if it has any, from the device at once."""
        if not metrics:
            return
        names = list(metrics)
        values = torch.stack([metrics[name].double() for name in names]).tolist()
        found = dict(zip(names, values, strict=True))
        for name, value in found.items():
            if name.endswith("_max"):
                self.sums[name] = max(float(value), self.sums.get(name, float(value)))
                continue
            rows = 1.0 if name in self.COUNTS else self._num_rows(name, found)
            self.sums[name] = self.sums.get(name, 0.0) + rows * value
            self.rows[name] = self.rows.get(name, 0.0) + rows

    def join(self, other: MetricSums) -> None:
        """Take in the sums of another."""
        for name, value in other.sums.items():
            if name.endswith("_max"):
                self.sums[name] = max(value, self.sums.get(name, value))
                continue
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.rows[name] = self.rows.get(name, 0.0) + other.rows[name]

    def joined(self) -> dict[str, float | None]:
        """None where there was no row to take a mean of."""
        return {name: self._join(name, total) for name, total in self.sums.items()}

    def _num_rows(self, name: str, found: Mapping[str, float]) -> float:
        if name in self.OVER_SHAPED_ROWS:
            return found["num_shaped"]
        if name in self.OVER_TRAINED_ROWS:
            return found["num_trained"]
        return found["num_trained"] - found["num_shaped"]

    def _join(self, name: str, total: float) -> float | None:
        if name.endswith("_max") or name in self.COUNTS:
            return total
        return total / self.rows[name] if self.rows[name] else None


@dataclass
class BatchSums:
    """What the micro-batches of one update add up to."""

    loss: float = 0.0
    num_tokens: int = 0
    read: TokensRead = field(default_factory=TokensRead)
    metrics: MetricSums = field(default_factory=MetricSums)
    replay_ratios: list[Tensor] = field(default_factory=list)
    guided: list[GuidedTokens] = field(default_factory=list)

    def over(self, processes: Processes) -> BatchSums:
        """What those of all processes add up to, by rank; the same on each."""
        if processes.count == 1:
            return self
        assert not self.guided, "guided tokens stay in one process"
        total = BatchSums()
        own = [self.loss, self.num_tokens, self.metrics.sums, self.metrics.rows, vars(self.read)]
        for loss, num_tokens, sums, rows, read, ratios in processes.gather(
            [*own, [ratio.tolist() for ratio in self.replay_ratios]]
        ):
            total.read.join(TokensRead(**read))
            total.loss += loss
            total.num_tokens += num_tokens
            total.metrics.join(MetricSums(sums, rows))
            total.replay_ratios += [torch.tensor(ratio) for ratio in ratios]
        return total


def guided_tokens(
    packed: Pack,
    trajectories: Sequence[Trajectory],
    columns: TokenColumns,
    ratio_N: Tensor,
    objective: PolicyObjective,
) -> GuidedTokens:
    members = [trajectories[i] for i in packed.index]
    redrawn_N = torch.cat(
        [torch.zeros(t.num_tokens) if t.guidance is None else t.guidance.redrawn for t in members]
    )
    high_N = columns.advantages > 0
    clipped_N = high_N & (ratio_N > 1 + (objective.clip_high or float("inf")))
    clipped_N |= ~high_N & (ratio_N < 1 - (objective.clip_low or float("inf")))
    rows = packed.rows_of([t.guidance is not None for t in trajectories])
    return GuidedTokens(ratio_N[rows].cpu(), redrawn_N.bool()[rows.cpu()], clipped_N[rows].cpu())


def replay_ratio_metrics(ratios: Sequence[Tensor]) -> dict[str, float | None]:
    """How far the policy has moved from those that produced the replayed tokens."""
    joined = torch.cat([torch.empty(0), *(ratio.cpu() for ratio in ratios)])
    if not len(joined):
        return dict.fromkeys(("replay_ratio_mean", "replay_ratio_p99", "replay_ratio_max"))
    return {
        "replay_ratio_mean": float(joined.mean()),
        "replay_ratio_p99": float(np.quantile(joined.numpy(), 0.99)),
        "replay_ratio_max": float(joined.max()),
    }


def guided_ratio_metrics(guided: Sequence[GuidedTokens]) -> dict[str, float | None]:
    """The ratio to the denominators of the importance mode, by who drew the token."""
    if not guided:
        return {}
    ratios, redrawn, clipped = (torch.cat(parts) for parts in zip(*guided, strict=True))
    return {
        "prior_ratio_kept_mean": mean_or_none(ratios[~redrawn]),
        "prior_ratio_redrawn_mean": mean_or_none(ratios[redrawn]),
        "prior_clip_frac": mean_or_none(clipped.float()),
    }


def mean_or_none(values: Tensor) -> float | None:
    return float(values.mean()) if len(values) else None
