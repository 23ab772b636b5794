"""Sequences -> padding-free micro-batches.

Completions to the same prompt that meet in a pack share one reading of it.

Legend of shapes
    S   sequences, each a completion behind its prompt
    G   prompts that are read, each once
    L   tokens the model reads: each prompt, then its completions, each without its last token
        (nothing is predicted from it)
    N   completion tokens, the rows of the loss
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from exgrpo_fast.core.transfer import to_device
from exgrpo_fast.core.types import Completion, Trajectory
from exgrpo_fast.model.attention.layout import AttentionLayout
from exgrpo_fast.model.oom import Extent


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


def sequences_of(trajectories: Sequence[Trajectory]) -> tuple[Ragged, Ragged]:
    """(prompts, completions), on the CPU."""
    prompts = Ragged.of([t.question.prompt_ids for t in trajectories])
    return prompts, Ragged.of([t.token_ids for t in trajectories])


def kept_sets(members: Sequence[Completion | Trajectory]) -> Ragged | None:
    """One sequence of int32 ids for each token: what it was drawn from, on the CPU.

    None where all of them were drawn from the whole vocabulary.
    """
    found = [member.kept for member in members if member.kept is not None]
    if not found:
        return None
    assert len(found) == len(members), "some completions have their kept sets, others have not"
    return Ragged(torch.cat([k.ids for k in found]), torch.cat([k.counts for k in found]))


def padded_ids(kept: Ragged) -> Tensor:
    """int32 [N, K] as the kernels take them, -1 behind the last."""
    width = max(1, int(kept.lengths.max())) if len(kept) else 1
    ids = torch.full((len(kept), width), -1, dtype=torch.int32)
    ids[torch.arange(width) < kept.lengths[:, None]] = kept.values.to(torch.int32)
    return ids


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
    position_ids: Tensor  # int64 [L], from 0 in a prompt, from its length in its completions
    layout: AttentionLayout  # where prompts and completions lie in [L]
    rows: Tensor  # int64 [N], the positions in [L] whose hidden state predicts `targets`; the last
    # token of a prompt predicts the first one of each of its completions
    targets: Tensor  # int64 [N]
    lengths: tuple[int, ...]  # completion tokens of each sequence, sum N
    index: tuple[int, ...]

    def places_in(self, completions: Ragged) -> Tensor:
        """int64 [N], on the CPU: the place of each row among the caller's completions."""
        members, lengths = torch.tensor(self.index), torch.tensor(self.lengths)
        of_row, place = places(lengths, "cpu")
        return completions.starts[members][of_row] + place


class AssignedPack(NamedTuple):
    """A pack that a rank works on. `counts=False`: a dummy pass so that all ranks run the same
    collectives; its tokens have no weight."""

    pack: Pack
    counts: bool


def pack(
    prompts: Ragged, completions: Ragged, *, max_tokens: int, device: torch.device | str = "cpu"
) -> list[Pack]:
    """Fill packs of at most `max_tokens` read tokens, longest sequences first.

    Longest first keeps similar lengths together and shows an out-of-memory in the first pack.
    Completions of one prompt are neighbours; where they do not all fit, the next pack reads the
    prompt again. A sequence longer than `max_tokens` gets a pack of its own.
    """
    prompt_of = same_prompts(prompts)
    members = fill(prompts.lengths, completions.lengths, prompt_of, max_tokens=max_tokens)
    prompts, completions = (Ragged(x.values.cpu(), x.lengths) for x in (prompts, completions))
    tokens = torch.cat([prompts.values, completions.values]).long()
    return [_join(prompts, completions, prompt_of, tokens, of_pack, device) for of_pack in members]


def same_prompts(prompts: Ragged) -> Tensor:
    """int64 [S]: equal numbers for prompts of equal tokens, counted as they first appear."""
    known: dict[bytes, int] = {}
    tokens = Ragged(prompts.values.cpu(), prompts.lengths).split()
    return torch.tensor([known.setdefault(t.numpy().tobytes(), len(known)) for t in tokens])


def extent(prompts: Ragged, completions: Ragged) -> Extent:
    """Of sequences, each a completion behind its prompt."""
    prompt_of = same_prompts(prompts).tolist()
    once = dict(zip(prompt_of, prompts.lengths.tolist(), strict=True))
    longest = int((prompts.lengths + completions.lengths).max())
    return Extent(longest, sum(once.values()) + int(completions.lengths.sum()))


def fill(
    prompt_lengths_S: Tensor, lengths_S: Tensor, prompt_of_S: Tensor, *, max_tokens: int
) -> list[Tensor]:
    """The sequences of each pack, int64, in the order in which they are read."""
    prompt_of = prompt_of_S.tolist()
    read_lengths = (lengths_S - 1).tolist()
    sizes = (prompt_lengths_S + lengths_S - 1).tolist()
    longest = [0] * len(sizes)  # sequence behind each prompt
    for prompt, size in zip(prompt_of, sizes, strict=True):
        longest[prompt] = max(longest[prompt], size)
    order = sorted(
        range(len(sizes)), key=lambda s: (-longest[prompt_of[s]], prompt_of[s], -sizes[s])
    )
    packs: list[list[int]] = []
    used, prompt_at_hand = 0, None
    for s in order:
        is_read = prompt_of[s] == prompt_at_hand
        added = read_lengths[s] if is_read else sizes[s]
        if not packs or used + added > max_tokens:
            packs.append([])
            used, added = 0, sizes[s]
        packs[-1].append(s)
        used, prompt_at_hand = used + added, prompt_of[s]
    return [torch.tensor(members) for members in packs]


def _join(
    prompts: Ragged,
    completions: Ragged,
    prompt_of: Tensor,
    tokens: Tensor,
    members: Tensor,
    device: torch.device | str,
) -> Pack:
    """`tokens`: all prompts and completions end to end. Made on the CPU, sent in one copy."""
    lengths = completions.lengths[members]
    _, group_of, sizes = prompt_of[members].unique_consecutive(
        return_inverse=True, return_counts=True
    )
    readers = members[starts_of(sizes)]  # the first sequence of each prompt
    prompt_lengths = prompts.lengths[readers]
    layout = AttentionLayout(prompt_lengths, lengths - 1, group_of)
    prompt_sources = prompts.starts[readers]
    completion_sources = completions.starts[members] + len(prompts.values)

    # prompts and completions as segments, in reading order
    order = torch.cat([layout.prompt_starts, layout.completion_starts]).argsort(stable=True)
    segment_lengths = torch.cat([prompt_lengths, lengths - 1])[order]
    sources = torch.cat([prompt_sources, completion_sources])[order]
    positions = torch.cat([torch.zeros_like(prompt_lengths), prompt_lengths[group_of]])[order]
    of_segment, place = places(segment_lengths, "cpu")

    of_row, step = places(lengths, "cpu")
    prompt_ends = (layout.prompt_starts + prompt_lengths - 1)[group_of]
    in_completion = layout.completion_starts.index_select(0, of_row) + step - 1
    input_ids, position_ids, rows, targets = to_device(
        [
            tokens.index_select(0, sources.index_select(0, of_segment) + place),
            positions.index_select(0, of_segment) + place,
            torch.where(step == 0, prompt_ends.index_select(0, of_row), in_completion),
            tokens.index_select(0, completion_sources.index_select(0, of_row) + step),
        ],
        device,
    )
    return Pack(
        input_ids=input_ids,
        position_ids=position_ids,
        layout=layout,
        rows=rows,
        targets=targets,
        lengths=tuple(lengths.tolist()),
        index=tuple(members.tolist()),
    )
