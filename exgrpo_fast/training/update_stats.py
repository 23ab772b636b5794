"""What the updates of a step saw: sums over packs and ranks, ratios, and what was refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from exgrpo_fast.core.process_group import Processes
from exgrpo_fast.core.transfer import HostRead
from exgrpo_fast.core.types import Trajectory
from exgrpo_fast.model.packing import Pack
from exgrpo_fast.training.batch import LossTerm, TrainingPack, UpdateBatch, ratio_columns_of
from exgrpo_fast.training.optim.optimiser import UpdateOutcome
from exgrpo_kernels import PolicyLoss, PolicyObjective


@dataclass(frozen=True)
class RefusedUpdate:
    """An update that left the weights alone because its numbers are broken."""

    reason: str
    terms: Sequence[LossTerm]
    grad_norm: float | None  # None: already the forward was not finite


class GuidedTokens(NamedTuple):
    """Of the prior-guided tokens of a micro-batch."""

    ratios: Tensor
    redrawn: Tensor  # bool
    clipped: Tensor  # bool


def tokens_read(packed: Pack) -> dict[str, int]:
    """What a forward pass reads: input tokens, padding included; of them prompt and completion tokens;
    and prompt tokens more, had every completion read its own."""
    layout = packed.layout
    prompts = int(layout.prompt_lengths.sum())
    return {
        "forwarded": packed.input_ids.numel(),
        "prompts": prompts,
        "completions": int(layout.completion_lengths.sum()),
        "prompts_shared": int(layout.prompt_lengths[layout.prompt_of].sum()) - prompts,
    }


class MetricSums:
    """Joins the kernels' metrics over micro-batches: *_max by maximum, counts by sum, and the rest
    by the mean over the rows that each is a mean of."""

    OVER_SHAPED_ROWS = {"shaped_mean"}
    OVER_TRAINED_ROWS = {"entropy_mean", "kl_ref", "teacher_divergence", "density", "skipped_mass"}
    COUNTS = {"num_trained", "num_shaped", "log_ratio_clamped", "rows_skipped"}

    def __init__(
        self, sums: Mapping[str, float] | None = None, rows: Mapping[str, float] | None = None
    ) -> None:
        self.sums = dict(sums or {})
        self.rows = dict(rows or {})

    def add(self, found: Mapping[str, float]) -> None:
        """The figures of one pack."""
        rows = {name: 1.0 if name in self.COUNTS else self._num_rows(name, found) for name in found}
        sums = {n: value if n.endswith("_max") else rows[n] * value for n, value in found.items()}
        self.join(MetricSums(sums, rows))

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


@dataclass(frozen=True)
class PackOnHost:
    """What is known of a pack without its tensors, which must not outlive its backward pass."""

    terms: Sequence[LossTerm]
    lengths: tuple[int, ...]  # completion tokens of each sequence
    read: dict[str, int]  # see `tokens_read`

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def reads_ratios(self) -> bool:
        """Whether a metric needs the ratio of each token."""
        return any(
            term.trajectory.source == "replay" or term.trajectory.guidance is not None
            for term in self.terms
        )

    def rows_of(self, wanted: Callable[[Trajectory], bool]) -> Tensor:
        """bool [N], on the CPU: the rows of the trajectories that are wanted."""
        mask = torch.tensor([wanted(term.trajectory) for term in self.terms])
        return mask.repeat_interleave(torch.tensor(self.lengths))


@dataclass
class BatchSums:
    """What the packs of one update, or of several, add up to."""

    # loss, tokens, and those of `tokens_read`
    counts: Counter[str] = field(default_factory=Counter)
    metrics: MetricSums = field(default_factory=MetricSums)
    replay_ratios: list[Tensor] = field(default_factory=list)  # of replayed tokens, by pack
    guided: list[GuidedTokens] = field(default_factory=list)  # by pack

    def add(
        self,
        part: PackOnHost,
        loss: float,
        metrics: Mapping[str, float],
        ratio_N: Tensor | None,
        objective: PolicyObjective,
    ) -> None:
        """The figures of one pack, on the CPU. `ratio_N`: where `part.reads_ratios`."""
        self.counts.update({"loss": loss, "tokens": part.num_tokens} | part.read)
        self.metrics.add(metrics)
        if ratio_N is None:
            return
        self.replay_ratios.append(ratio_N[part.rows_of(lambda t: t.source == "replay")])
        if any(term.trajectory.guidance is not None for term in part.terms):
            self.guided.append(guided_tokens(part, ratio_N, objective))

    def join(self, other: BatchSums) -> None:
        self.counts.update(other.counts)
        self.metrics.join(other.metrics)
        self.replay_ratios += other.replay_ratios
        self.guided += other.guided

    def over(self, processes: Processes) -> BatchSums:
        """The sum over all ranks, in their order; the same on each."""
        total = BatchSums()
        ratios = [ratio.tolist() for ratio in self.replay_ratios]
        guided = [[part.tolist() for part in parts] for parts in self.guided]
        own = [self.counts, self.metrics.sums, self.metrics.rows, ratios, guided]
        for counts, sums, rows, ratios, guided in processes.gather(own):
            total.join(
                BatchSums(
                    Counter(counts),
                    MetricSums(sums, rows),
                    [torch.tensor(ratio) for ratio in ratios],
                    [
                        GuidedTokens(
                            torch.tensor(found),
                            torch.tensor(redrawn).bool(),
                            torch.tensor(clipped).bool(),
                        )
                        for found, redrawn, clipped in guided
                    ],
                )
            )
        return total

    def read_metrics(self) -> dict[str, float | None]:
        """None where nothing was read."""
        read = self.counts
        padding = read["forwarded"] - read["prompts"] - read["completions"]
        prompts = read["prompts"] + read["prompts_shared"]
        return {
            "padding_frac": padding / read["forwarded"] if read["forwarded"] else None,
            "prompt_tokens_shared_frac": read["prompts_shared"] / prompts if prompts else None,
        }


class UnreadSums:
    """The figures of an update's packs while they are on the device: `send` starts one copy of all,
    and `read`, after the optimiser has waited for the norm of the gradient, finds them there."""

    def __init__(self) -> None:
        self._packs: list[tuple[PackOnHost, list[str]]] = []
        self._figures: list[Tensor] = []
        self._sent: HostRead | None = None

    def add(self, part: TrainingPack, result: PolicyLoss) -> None:
        pack = PackOnHost(part.terms, part.pack.lengths, tokens_read(part.pack))
        self._packs.append((pack, list(result.metrics)))
        scalars = [result.loss.detach(), *result.metrics.values()]
        self._figures.append(torch.stack([x.double() for x in scalars]))
        if pack.reads_ratios:
            self._figures.append(result.ratio.detach())

    def send(self) -> None:
        if self._figures:  # a rank may have none
            self._sent = HostRead([figure.double() for figure in self._figures])
            self._figures.clear()

    def read(self, objective: PolicyObjective) -> BatchSums:
        sums = BatchSums()
        if self._sent is None:
            return sums
        values, start = self._sent.values(), 0
        for pack, names in self._packs:
            stop = start + 1 + len(names)
            loss, *metrics = values[start:stop].tolist()
            start = stop + pack.num_tokens * pack.reads_ratios
            ratio_N = values[stop:start].float() if pack.reads_ratios else None
            sums.add(pack, loss, dict(zip(names, metrics, strict=True)), ratio_N, objective)
        return sums


@dataclass
class UpdateReport:
    """The optimiser updates of one step."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    lr: float | None = None  # of the last update; None where nothing was updated
    sums: BatchSums = field(default_factory=BatchSums)
    skipped: Counter[str] = field(default_factory=Counter)
    refused: list[RefusedUpdate] = field(default_factory=list)
    # times that memory ran out, in scoring or in the update, and the pass was done again
    chunk_halvings: int = 0
    microbatch_halvings: int = 0

    @property
    def loss(self) -> float:
        """Mean over the updates."""
        return sum(self.losses) / len(self.losses) if self.losses else 0.0

    def add(self, sums: BatchSums, outcome: UpdateOutcome) -> None:
        self.losses.append(float(sums.counts["loss"]))
        self.grad_norms.append(outcome.grad_norm)
        self.lr = outcome.lr
        self.sums.join(sums)

    def refuse(self, reason: str, batch: UpdateBatch, grad_norm: float | None) -> None:
        self.skipped[reason] += 1
        self.refused.append(RefusedUpdate(reason, batch.terms, grad_norm))

    @property
    def tokens_trained(self) -> int:
        return self.sums.counts["tokens"]

    @property
    def kernel_metrics(self) -> dict[str, float | None]:
        """The kernels' metrics, and the ratios of replayed and of prior-guided tokens."""
        ratios = replay_ratio_metrics(self.sums.replay_ratios)
        return self.sums.metrics.joined() | ratios | guided_ratio_metrics(self.sums.guided)


def guided_tokens(part: PackOnHost, ratio_N: Tensor, objective: PolicyObjective) -> GuidedTokens:
    members = [term.trajectory for term in part.terms]
    redrawn_N = torch.cat(
        [torch.zeros(t.num_tokens) if t.guidance is None else t.guidance.redrawn for t in members]
    )
    high_N = torch.cat([ratio_columns_of(term, objective)[1] for term in part.terms]) > 0
    clipped_N = high_N & (ratio_N > 1 + (objective.clip_high or float("inf")))
    clipped_N |= ~high_N & (ratio_N < 1 - (objective.clip_low or float("inf")))
    rows = part.rows_of(lambda t: t.guidance is not None)
    return GuidedTokens(ratio_N[rows], redrawn_N.bool()[rows], clipped_N[rows])


def replay_ratio_metrics(ratios: Sequence[Tensor]) -> dict[str, float | None]:
    """How far the policy has moved from those that produced the replayed tokens."""
    joined = torch.cat([torch.empty(0), *ratios])
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
