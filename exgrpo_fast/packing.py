"""Sequences -> padding-free micro-batches, and trajectories -> TokenColumns.

Legend of shapes
    S   sequences
    L   tokens the model reads: all sequences end to end, each prompt + response without its last
        token (nothing is predicted from it)
    N   response tokens, the rows of the loss
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from exgrpo_fast.experience import TokenColumns, Trajectory

Aggregation = Literal["token_mean", "sequence_mean", "constant"]


@dataclass(frozen=True)
class Ragged:
    """Sequences joined end to end. The lengths stay on the CPU: they decide shapes, and reading
    them must not wait for a device."""

    values: Tensor  # [N]
    lengths: Tensor  # int64 [S], on the CPU

    @staticmethod
    def of(sequences: Sequence[Sequence[int] | Tensor]) -> Ragged:
        """int64 tokens, on the CPU."""
        lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)
        if sequences and isinstance(sequences[0], Tensor):
            return Ragged(torch.cat([torch.as_tensor(s).long() for s in sequences]), lengths)
        joined = [token for sequence in sequences for token in sequence]
        return Ragged(torch.tensor(joined, dtype=torch.int64), lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def starts(self) -> Tensor:
        return starts_of(self.lengths)

    def pick(self, index: Tensor) -> Ragged:
        """The sequences of an index [A] (on the CPU), some maybe several times."""
        lengths, device = self.lengths[index], self.values.device
        owner, place = places(lengths, device)
        starts = self.starts[index].to(device, non_blocking=True)
        return Ragged(self.values.index_select(0, starts.index_select(0, owner) + place), lengths)

    def to(self, device: torch.device | str) -> Ragged:
        return Ragged(self.values.to(device, non_blocking=True), self.lengths)

    def split(self) -> tuple[Tensor, ...]:
        return self.values.split(self.lengths.tolist())


def starts_of(lengths_S: Tensor) -> Tensor:
    """[S]: where each sequence begins."""
    return lengths_S.cumsum(0) - lengths_S


def places(lengths_S: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(sequence [N], position in it [N]) of every element, without waiting for the device."""
    count = int(lengths_S.sum())
    repeats = lengths_S.to(device, non_blocking=True)
    of_sequence = torch.repeat_interleave(repeats, output_size=count)
    starts = starts_of(lengths_S).to(device, non_blocking=True)
    # index_select: on a CPU it is several times faster than indexing, here and below
    return of_sequence, torch.arange(count, device=device) - starts.index_select(0, of_sequence)


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

    def rows_of(self, wanted: Sequence[bool]) -> Tensor:
        """bool [N]: the rows of those of the caller's sequences that are wanted."""
        lengths = torch.tensor(self.lengths)
        mask = torch.tensor([wanted[i] for i in self.index]).repeat_interleave(lengths)
        return mask.to(self.targets.device)

    def places_in(self, responses: Ragged) -> Tensor:
        """int64 [N]: where each row stands among the caller's responses."""
        members, lengths = torch.tensor(self.index), torch.tensor(self.lengths)
        of_row, place = places(lengths, self.targets.device)
        return responses.starts[members].to(self.targets.device)[of_row] + place


class Dealt(NamedTuple):
    """A pack that a process works on. One that does not count is gone through for the company of
    others alone: its tokens weigh nothing."""

    pack: Pack
    counts: bool


def pack(
    prompts: Ragged, responses: Ragged, *, max_tokens: int, device: torch.device | str = "cpu"
) -> list[Pack]:
    """Fill packs of at most `max_tokens` read tokens, longest sequences first.

    Longest first keeps similar lengths together and shows an out-of-memory in the first pack.
    A sequence longer than `max_tokens` gets a pack of its own.
    """
    prompts, responses = prompts.to(device), responses.to(device)
    sizes = prompts.lengths + responses.lengths - 1
    order = sizes.argsort(descending=True, stable=True)
    ends = sizes[order].cumsum(0)
    packs, start, used = [], 0, 0
    while start < len(order):
        stop = int(torch.searchsorted(ends, used + max_tokens, right=True))
        stop = max(stop, start + 1)
        packs.append(_join(prompts, responses, order[start:stop]))
        start, used = stop, int(ends[stop - 1])
    return packs


def _join(prompts: Ragged, responses: Ragged, members: Tensor) -> Pack:
    device = responses.values.device
    prompt_lengths, lengths = prompts.lengths[members], responses.lengths[members]
    read_lengths = prompt_lengths + lengths - 1
    read_starts = starts_of(read_lengths)

    def on_device(values: Tensor) -> Tensor:
        return values.to(device, non_blocking=True)

    def spread(values_S: Tensor, of_element: Tensor) -> Tensor:
        return on_device(values_S).index_select(0, of_element)

    of_sequence, position_ids = places(read_lengths, device)
    offset = position_ids - spread(prompt_lengths, of_sequence)  # into the response, from 0
    in_prompt = spread(prompts.starts[members], of_sequence) + position_ids
    in_response = spread(responses.starts[members], of_sequence) + offset
    input_ids = torch.where(
        offset < 0,
        prompts.values.index_select(0, in_prompt.clamp(max=len(prompts.values) - 1)),
        responses.values.index_select(0, in_response.clamp(min=0)),
    )
    of_row, place = places(lengths, device)
    in_responses = spread(responses.starts[members], of_row) + place
    return Pack(
        input_ids=input_ids.long(),
        position_ids=position_ids,
        cu_seqlens=on_device(torch.cat([read_starts, read_lengths.sum()[None]]).int()),
        max_length=int(read_lengths.max()),
        rows=spread(read_starts + prompt_lengths - 1, of_row) + place,
        targets=responses.values.index_select(0, in_responses).long(),
        lengths=tuple(lengths.tolist()),
        index=tuple(members.tolist()),
    )


# --- trajectories -> columns ----------------------------------------------------------------------


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


def fill_columns(
    packed: Pack,
    trajectories: Sequence[Trajectory],
    *,
    behaviour_logprobs: Sequence[Tensor],
    advantages: Sequence[Tensor],
    weights: Sequence[float],
    ref_logprobs: Sequence[Tensor] | None = None,
) -> TokenColumns:
    """The columns of one pack; the sequences are the caller's lists, `packed.index` picks.

    Log-probs and advantages come by the token [T], weights by the trajectory; a trajectory's own
    `token_weights` are factors of them.
    """
    device = packed.targets.device
    lengths = torch.tensor(packed.lengths, device=device)

    def spread(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device).repeat_interleave(lengths)

    def join(values: Sequence[Tensor]) -> Tensor:
        return torch.cat([values[i] for i in packed.index]).to(device, torch.float32)

    weights_N = spread([weights[i] for i in packed.index])
    if any(t.token_weights is not None for t in trajectories):
        weights_N = weights_N * join([factors_of(t) for t in trajectories])
    return TokenColumns(
        targets=packed.targets,
        behaviour_logprobs=join(behaviour_logprobs),
        advantages=join(advantages),
        weights=weights_N,
        shaping=spread([trajectories[i].shaping for i in packed.index]),
        sequence_ids=torch.arange(len(packed.index), device=device).repeat_interleave(lengths),
        ref_logprobs=None if ref_logprobs is None else join(ref_logprobs),
    )


def factors_of(trajectory: Trajectory) -> Tensor:
    """float32 [T]: its `token_weights`, or ones."""
    if trajectory.token_weights is None:
        return torch.ones(trajectory.num_tokens)
    return trajectory.token_weights
