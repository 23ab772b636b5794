"""torch's flex_attention: the rule of who sees whom, compiled into a kernel that skips blocks.

CUDA: on a CPU it has no backward pass, and uncompiled it holds [L, L].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)

from exgrpo_fast.core.transfer import to_device
from exgrpo_fast.model.attention.layout import AttentionLayout, Scoring


class Flex:
    """The `flex` back end for one pack."""

    def __init__(self, layout: AttentionLayout, device: torch.device) -> None:
        own, prompt, position = to_device(segments(layout), device)
        self.own_L, self.prompt_L, self.position_L = own, prompt, position
        self.masks: dict[int | None, BlockMask] = {}

    def __call__(
        self,
        query: Tensor,  # [L, heads, head size]
        key: Tensor,  # [L, key heads, head size]
        value: Tensor,
        scoring: Scoring,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """[L, heads, head size]."""
        assert not scoring.dropout, "flex_attention has no dropout"
        out, aux = _flex_attention(query.device.type)(
            *(x.transpose(0, 1)[None] for x in (query, key, value)),
            block_mask=self._mask(scoring.window),
            scale=scoring.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
            return_aux=AuxRequest(lse=sinks is not None),
        )
        if sinks is not None:
            # exp(score) / (sum of exp(scores) + exp(sink)) = softmax(score) x sigmoid(lse - sink)
            out = out * (aux.lse - sinks[:, None]).sigmoid()[..., None].to(out.dtype)
        return out[0].transpose(0, 1)

    def _mask(self, window: int | None) -> BlockMask:
        if window not in self.masks:
            device, length = self.own_L.device, len(self.own_L)
            self.masks[window] = create_block_mask(
                self._sees(window),
                None,
                None,
                length,
                length,
                device=device,  # pyright: ignore[reportArgumentType]
                _compile=device.type == "cuda",  # uncompiled it holds [L, L]
            )
        return self.masks[window]

    def _sees(self, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        own, prompt, position = self.own_L, self.prompt_L, self.position_L

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            distance = position[query] - position[key]
            near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            return near & ((own[key] == own[query]) | (own[key] == prompt[query]))

        return sees


@functools.cache
def _flex_attention(device: str) -> Any:
    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention


def segments(layout: AttentionLayout) -> tuple[Tensor, Tensor, Tensor]:
    """int64 [L], [L], [L]: the segment of each token, that of its prompt, its position.

    Segment g is prompt g, segment G + s completion s.
    """
    own, prompt, position = torch.empty(3, layout.num_tokens, dtype=torch.int64)
    starts = torch.cat([layout.prompt_starts, layout.completion_starts]).tolist()
    lengths = torch.cat([layout.prompt_lengths, layout.completion_lengths]).tolist()
    prompts = torch.arange(len(layout.prompt_lengths))
    of_prompt = torch.cat([prompts, layout.prompt_of]).tolist()
    firsts = torch.cat([0 * prompts, layout.prompt_lengths[layout.prompt_of]]).tolist()
    for segment, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        place = slice(start, start + length)
        own[place], prompt[place] = segment, of_prompt[segment]
        position[place] = firsts[segment] + torch.arange(length)
    return own, prompt, position
