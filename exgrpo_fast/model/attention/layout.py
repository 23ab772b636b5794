"""Where prompts and completions lie in a pack.

    [prompt 0][completion 0][completion 1]...[prompt 1][completion 2]...

Legend of shapes
    G   prompts of the pack
    S   completions, each behind the prompt `prompt_of`
    L   tokens the model reads
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Scoring(NamedTuple):
    """How a layer scores its keys, and what it drops."""

    scaling: float | None = None  # of the scores; None: 1 / sqrt(head size)
    window: int | None = None  # tokens that are seen, the own one included; None: all
    dropout: float = 0.0


@dataclass(frozen=True)
class AttentionLayout:
    """Everything int64 and on the CPU: it decides shapes. A completion may have no token to read."""

    prompt_lengths: Tensor  # [G]
    completion_lengths: Tensor  # [S], tokens that are read
    prompt_of: Tensor  # [S], ascending; every prompt has a completion

    @cached_property
    def num_tokens(self) -> int:
        """L."""
        return int(self.prompt_lengths.sum() + self.completion_lengths.sum())

    @cached_property
    def prompt_starts(self) -> Tensor:
        """[G]: the place of each prompt's first token in [L]."""
        read_behind = torch.zeros_like(self.prompt_lengths)
        read_behind.index_add_(0, self.prompt_of, self.completion_lengths)
        sizes = self.prompt_lengths + read_behind
        return sizes.cumsum(0) - sizes

    @cached_property
    def completion_starts(self) -> Tensor:
        """[S]: the place of each completion's first token in [L]."""
        prompts_before = self.prompt_lengths.cumsum(0)[self.prompt_of]
        return prompts_before + self.completion_lengths.cumsum(0) - self.completion_lengths

    @cached_property
    def sequence_lengths(self) -> Tensor:
        """[S]: each completion with its prompt."""
        return self.prompt_lengths[self.prompt_of] + self.completion_lengths

    @cached_property
    def is_first(self) -> Tensor:
        """bool [S]: the first completion of its prompt."""
        before = torch.cat([self.prompt_of.new_tensor([-1]), self.prompt_of[:-1]])
        return self.prompt_of != before

    @cached_property
    def asking(self) -> Tensor:
        """int64: the completions that bring queries, their own or their prompt's."""
        return (self.is_first | (self.completion_lengths > 0)).nonzero()[:, 0]

    def sequence_places(self, completion: int) -> Tensor:
        """[P + R]: the places in [L] of one completion and its prompt, in reading order."""
        prompt = int(self.prompt_of[completion])
        spans = (
            (self.prompt_starts[prompt], self.prompt_lengths[prompt]),
            (self.completion_starts[completion], self.completion_lengths[completion]),
        )
        return torch.cat([torch.arange(int(start), int(start + length)) for start, length in spans])
