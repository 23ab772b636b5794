"""The decoding loop that transformers' `generate` is given in place of its own.

A prompt is read once for all of its samples, rows that have ended leave the batch, and keys and
values are written into room that is there already. transformers' loop reads the prompt of every
sample, carries ended rows along to the end of the longest one, and copies the cache at each token.

Legend: R requests, B rows that go on, U different prompts, T response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from exgrpo_fast.rollout.drawing import draw, signed
from exgrpo_fast.rollout.engine import Sampling

ROOM = 64  # tokens that the cache grows by
LEAVING_SHARE = 8  # rows leave once they are one in so many: moving the others costs a copy
TOKENS_UNSEEN = 16  # on a device that works ahead: tokens between two looks at who has ended


class Decoding:
    """One batch of requests. `tokens_RT` and `logprobs_RT` hold what was drawn; what stands behind
    the end token or the limit of a row says nothing."""

    def __init__(
        self,
        *,
        prompt_of: Sequence[int],
        seeds: Sequence[int],
        limits: Sequence[int],
        sampling: Sampling,
        eos_token_ids: Sequence[int],
        device: torch.device,
        waiting: Callable[[], None] = lambda: None,
    ) -> None:
        """`prompt_of`: the row of each request's prompt in the ids that `generate` is given;
        `limits`: tokens of each request; `waiting` is called once a token."""
        self.prompt_of = torch.tensor(prompt_of, device=device)
        self.seeds_B = torch.tensor([signed(s) for s in seeds], dtype=torch.int64, device=device)
        self.limits_B = torch.tensor(limits, device=device)
        self.rows_B = torch.arange(len(seeds), device=device)
        self.going_B = torch.ones_like(self.rows_B, dtype=torch.bool)
        self.num_tokens = max(limits)
        self.tokens_RT = torch.zeros(len(seeds), self.num_tokens, dtype=torch.int64, device=device)
        self.logprobs_RT = torch.zeros(len(seeds), self.num_tokens, device=device)
        self.sampling = sampling
        self.eos_token_ids = torch.tensor(eos_token_ids, device=device)
        self.waiting = waiting
        self.looks_every = 1 if device.type == "cpu" else TOKENS_UNSEEN

    def __call__(self, model: Any, input_ids: Tensor, **model_kwargs: Any) -> Tensor:
        """`generate` calls this with the prompts [U, P] and what it has made ready for its own
        loop; the model's own settings of how to sample are not ours."""
        for name in ("logits_processor", "stopping_criteria", "generation_config"):
            model_kwargs.pop(name)
        give_room(model_kwargs["past_key_values"])
        inputs = model.prepare_inputs_for_generation(
            input_ids, is_first_iteration=True, **model_kwargs
        )
        logits_BV = self._read(model, inputs, model_kwargs)
        logits_BV = self._select(self.prompt_of, logits_BV, model_kwargs)
        for position in range(self.num_tokens):
            self.waiting()
            drawn_B = self._draw(logits_BV, position)
            kept = self._kept(position)
            if kept is not None and not len(kept):
                break
            if kept is not None:
                drawn_B = self._select(kept, drawn_B, model_kwargs)
                self.rows_B, self.seeds_B, self.limits_B, self.going_B = (
                    of_row[kept]
                    for of_row in (self.rows_B, self.seeds_B, self.limits_B, self.going_B)
                )
            if position + 1 < self.num_tokens:
                inputs = model.prepare_inputs_for_generation(
                    drawn_B[:, None], next_sequence_length=1, **model_kwargs
                )
                logits_BV = self._read(model, inputs, model_kwargs)
        return self.tokens_RT

    def _read(self, model: Any, inputs: dict[str, Any], model_kwargs: dict[str, Any]) -> Tensor:
        """The logits behind the last token that was read; `model_kwargs` are brought forward."""
        outputs = model(**inputs, return_dict=True)
        model_kwargs |= model._update_model_kwargs_for_generation(outputs, model_kwargs)
        return outputs.logits[:, -1]

    def _draw(self, logits_BV: Tensor, position: int) -> Tensor:
        drawn_B, logprobs_B = draw(logits_BV, self.seeds_B, position, self.sampling)
        self.tokens_RT[self.rows_B, position] = drawn_B
        self.logprobs_RT[self.rows_B, position] = logprobs_B
        self.going_B &= ~torch.isin(drawn_B, self.eos_token_ids)
        self.going_B &= self.limits_B > position + 1
        return drawn_B

    def _kept(self, position: int) -> Tensor | None:
        """The rows that go on, once enough others have ended; None: all stay for now."""
        if (position + 1) % self.looks_every:
            return None
        kept = self.going_B.nonzero()[:, 0]
        num_ended = len(self.going_B) - len(kept)
        stay = num_ended * LEAVING_SHARE < len(self.going_B)
        return None if stay else kept

    @staticmethod
    def _select(rows: Tensor, of_row: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        """`of_row`, the cache and the inputs of these rows alone, some maybe several times."""
        model_kwargs["past_key_values"].reorder_cache(rows)
        for name in ("attention_mask", "position_ids"):
            if model_kwargs.get(name) is not None:
                model_kwargs[name] = model_kwargs[name].index_select(-2, rows)
        return of_row.index_select(0, rows)


# --- cache ----------------------------------------------------------------------------------------


class RoomyLayer(DynamicLayer):
    """Keys and values [B, heads, length, head size], views of a buffer with room behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: dict[str, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def _append(self, name: str, held: Tensor | None, new: Tensor) -> Tensor:
        before = held.shape[-2] if held is not None and held.numel() else 0
        length = before + new.shape[-2]
        buffer = self.buffers.get(name)
        if buffer is None or buffer.shape[-2] < length:
            buffer = new.new_empty(*new.shape[:-2], length + ROOM, new.shape[-1])
            if held is not None and before:
                buffer[..., :before, :] = held
            self.buffers[name] = buffer
        buffer[..., before:length, :] = new
        return buffer[..., :length, :]

    def reorder_cache(self, beam_idx: Any) -> None:
        self.buffers.clear()  # keys and values leave them
        super().reorder_cache(beam_idx)


def give_room(cache: Cache) -> None:
    """Layers that keep everything keep it with room; those that forget stay as they are."""
    cache.layers = [RoomyLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = RoomyLayer
