"""Sequences -> padding-free micro-batches, and trajectories -> TokenColumns.

Legend of shapes
    S   sequences in one pack
    L   tokens the model reads: all sequences end to end, each prompt + response without its last
        token (nothing is predicted from it)
    N   response tokens, the rows of the loss
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from exgrpo_fast.experience import TokenColumns, Trajectory

Aggregation = Literal["token_mean", "sequence_mean", "constant"]


@dataclass(frozen=True)
class Pack:
    """What one forward pass reads. `index[s]` is the place of sequence s in the caller's list."""

    input_ids: Tensor  # int64 [L]
    position_ids: Tensor  # int64 [L], from 0 in every sequence
    cu_seqlens: Tensor  # int32 [S + 1], where sequences begin and end in [L]
    max_length: int  # longest sequence
    rows: Tensor  # int64 [N], the positions in [L] whose hidden state predicts `targets`
    targets: Tensor  # int64 [N]
    lengths: tuple[int, ...]  # response tokens of each sequence, sum N
    index: tuple[int, ...]

    def split(self, values_N: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(place in the caller's list, that sequence's values [T]) for a tensor over the rows."""
        return zip(self.index, values_N.split(self.lengths), strict=True)


def pack(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Tensor],
    *,
    max_tokens: int,
    device: torch.device | str = "cpu",
) -> list[Pack]:
    """Fill packs of at most `max_tokens` read tokens, longest sequences first.

    Longest first keeps similar lengths together and shows an out-of-memory in the first pack.
    A sequence longer than `max_tokens` gets a pack of its own.
    """
    sizes = [len(p) + len(r) - 1 for p, r in zip(prompts, responses, strict=True)]
    packs, members, used = [], [], 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if members and used + sizes[i] > max_tokens:
            packs.append(_join(prompts, responses, members, device))
            members, used = [], 0
        members.append(i)
        used += sizes[i]
    if members:
        packs.append(_join(prompts, responses, members, device))
    return packs


def _join(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Tensor],
    members: Sequence[int],
    device: torch.device | str,
) -> Pack:
    inputs, positions, rows, starts = [], [], [], [0]
    for i in members:
        prompt, response = torch.tensor(prompts[i], dtype=torch.int64), responses[i].cpu().long()
        read = torch.cat([prompt, response[:-1]])
        inputs.append(read)
        positions.append(torch.arange(len(read)))
        rows.append(torch.arange(len(prompt) - 1, len(read)) + starts[-1])
        starts.append(starts[-1] + len(read))
    return Pack(
        input_ids=torch.cat(inputs).to(device),
        position_ids=torch.cat(positions).to(device),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32, device=device),
        max_length=max(len(read) for read in inputs),
        rows=torch.cat(rows).to(device),
        targets=torch.cat([responses[i].cpu().long() for i in members]).to(device),
        lengths=tuple(len(responses[i]) for i in members),
        index=tuple(members),
    )


# --- trajectories -> columns ----------------------------------------------------------------------


def token_weights(
    aggregation: Aggregation, *, num_sequences: int, num_tokens: int, max_completion_tokens: int
) -> Callable[[int], float]:
    """length of a trajectory -> the weight of each of its tokens.

    token_mean     1 / tokens of the update batch                     DAPO, arXiv 2503.14476 eq. 8
    sequence_mean  1 / (sequences x own length)                       GRPO, arXiv 2402.03300 eq. 3
    constant       1 / (sequences x max_completion_tokens)            Dr.GRPO, arXiv 2503.20783

    `num_sequences` counts every trajectory of the update batch, also those without a gradient, and
    `num_tokens` their tokens; so neither micro-batches nor skipped rows change the loss.
    """
    if aggregation == "token_mean":
        return lambda length: 1.0 / max(num_tokens, 1)
    if aggregation == "sequence_mean":
        return lambda length: 1.0 / (num_sequences * length)
    return lambda length: 1.0 / (num_sequences * max_completion_tokens)


def fill_columns(
    packed: Pack,
    trajectories: Sequence[Trajectory],
    *,
    advantages: Sequence[float],
    weights: Sequence[float],
    ref_logprobs: Sequence[Tensor] | None = None,
) -> TokenColumns:
    """The columns of one pack; the sequences are the caller's lists, `packed.index` picks."""
    device = packed.targets.device
    lengths = torch.tensor(packed.lengths, device=device)

    def spread(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device).repeat_interleave(lengths)

    def join(values: Sequence[Tensor]) -> Tensor:
        return torch.cat([values[i] for i in packed.index]).to(device, torch.float32)

    return TokenColumns(
        targets=packed.targets,
        behaviour_logprobs=join([t.behaviour_logprobs for t in trajectories]),
        advantages=spread([advantages[i] for i in packed.index]),
        weights=spread([weights[i] for i in packed.index]),
        shaping=spread([trajectories[i].shaping for i in packed.index]),
        sequence_ids=torch.arange(len(packed.index), device=device).repeat_interleave(lengths),
        ref_logprobs=None if ref_logprobs is None else join(ref_logprobs),
    )
