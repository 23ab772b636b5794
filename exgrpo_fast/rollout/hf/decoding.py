"""The decoding loop of the transformers engine.

A prompt is read once for all of its samples, rows that have ended leave the batch, and keys and
values are written into memory that is allocated ahead. `generate` of transformers reads the prompt
of every sample, keeps ended rows until the longest one ends, and copies the cache at each
token.

The loop uses transformers' public interfaces alone: the model's `forward`, a `Cache`, and masks and
position ids that are made here. What `generate` keeps for itself changes between releases. On a CPU
`packed_decoder.py` computes the completions of the families that it knows.

Legend: R requests, B rows that go on, N branches, U different prompts, P prompt width, T completion tokens,
V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from exgrpo_fast.core.transfer import to_device
from exgrpo_fast.core.types import KeptTokens
from exgrpo_fast.model.packing import Ragged
from exgrpo_fast.model.renamed import cache_argument
from exgrpo_fast.rollout.engine import Sampling
from exgrpo_fast.rollout.hf.drawing import draw, signed
from exgrpo_fast.rollout.hf.packed_decoder import Branches, PackedDecoder

GROWTH = 64  # tokens that the cache grows by
LEAVING_SHARE = 8  # rows leave once they are one in so many: moving the others costs a copy
TOKENS_UNSEEN = 16  # on a device that works ahead: tokens between two looks at who has ended


class Decoding:
    """One batch of requests. `tokens_RT`, `logprobs_RT` and, where asked for, `entropies_RT` hold
    what was drawn; positions behind the end token or the limit of a row are undefined."""

    def __init__(
        self,
        *,
        prompt_of: Sequence[int],
        seeds: Sequence[int],
        limits: Sequence[int],
        sampling: Sampling,
        eos_token_ids: Sequence[int],
        device: torch.device,
        on_poll: Callable[[], None] = lambda: None,
    ) -> None:
        """`prompt_of`: the row of each request's prompt in the prompts that `run` is given;
        `limits`: tokens of each request; `on_poll` is called once a token."""
        given = [prompt_of, [signed(s) for s in seeds], limits, eos_token_ids]
        self.prompt_of, self.seeds_B, self.limits_B, self.eos_token_ids = to_device(
            [torch.tensor(values, dtype=torch.int64) for values in given], device
        )
        self.rows_B = torch.arange(len(seeds), device=device)
        self.going_B = torch.ones_like(self.rows_B, dtype=torch.bool)
        self.num_tokens = max(limits)
        self.tokens_RT = torch.zeros(len(seeds), self.num_tokens, dtype=torch.int64, device=device)
        self.logprobs_RT = torch.zeros(len(seeds), self.num_tokens, device=device)
        self.entropies_RT = torch.zeros_like(self.logprobs_RT) if sampling.entropies else None
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []  # of a position: rows, counts, ids
        self.sampling = sampling
        self.on_poll = on_poll
        self.looks_every = 1 if device.type == "cpu" else TOKENS_UNSEEN

    def run(
        self,
        model: Any,
        prompts_UP: Tensor,
        mask_UP: Tensor,
        decoder: PackedDecoder | None = None,
    ) -> None:
        """Fill `tokens_RT` and `logprobs_RT`. `prompts_UP` are padded at the left; `mask_UP`, int64,
        is 0 on padding. `decoder`: computes what follows the prompts in place of the model."""
        read = _Forward(model, mask_UP, self.num_tokens)
        logits_BV = read(prompts_UP).index_select(0, self.prompt_of)
        rows = (
            ModelRows(read, self.prompt_of)
            if decoder is None
            else BranchedRows(decoder, read.cache, mask_UP, self.prompt_of, self.num_tokens - 1)
        )
        for position in range(self.num_tokens):
            self.on_poll()
            drawn_B = self._draw(logits_BV, position)
            kept = self._kept(position)
            if kept is not None and not len(kept):
                break
            if kept is not None:
                rows.select(kept)
                drawn_B = drawn_B.index_select(0, kept)
                self._take(kept)
            if position + 1 < self.num_tokens:
                logits_BV, order_B = rows(drawn_B)
                if order_B is not None:
                    self._take(order_B)

    def _take(self, index_B: Tensor) -> None:
        self.rows_B, self.seeds_B, self.limits_B, self.going_B = (
            of_row.index_select(0, index_B)
            for of_row in (self.rows_B, self.seeds_B, self.limits_B, self.going_B)
        )

    def _draw(self, logits_BV: Tensor, position: int) -> Tensor:
        drawn = draw(logits_BV, self.seeds_B, position, self.sampling)
        drawn_B = drawn.tokens_B
        if drawn.kept_BK is not None:
            is_kept = drawn.kept_BK >= 0
            ids = drawn.kept_BK[is_kept].to(torch.int32)  # waits for the device, once a token
            self.kept.append((self.rows_B.cpu(), is_kept.sum(1).cpu(), ids.cpu()))
        self.tokens_RT[self.rows_B, position] = drawn_B
        self.logprobs_RT[self.rows_B, position] = drawn.logprobs_B
        if self.entropies_RT is not None and drawn.entropies_B is not None:
            self.entropies_RT[self.rows_B, position] = drawn.entropies_B
        self.going_B &= ~torch.isin(drawn_B, self.eos_token_ids)
        self.going_B &= self.limits_B > position + 1
        return drawn_B

    def kept_tokens(self) -> list[KeptTokens | None]:
        """What the tokens of each request were drawn from, positions behind its end included."""
        if not self.kept:
            return [None] * len(self.tokens_RT)
        rows, counts, ids = (torch.cat(parts) for parts in zip(*self.kept, strict=True))
        by_row = Ragged(ids, counts).pick(rows.argsort(stable=True))
        positions = torch.bincount(rows, minlength=len(self.tokens_RT)).tolist()
        counts_of = by_row.lengths.split(positions)
        ids_of = by_row.values.split([int(counts.sum()) for counts in counts_of])
        return [KeptTokens(*kept) for kept in zip(ids_of, counts_of, strict=True)]

    def _kept(self, position: int) -> Tensor | None:
        """The rows that go on, once enough others have ended; None: all stay for now."""
        if (position + 1) % self.looks_every or position + 1 == self.num_tokens:
            return None
        kept = self.going_B.nonzero()[:, 0]
        num_ended = len(self.going_B) - len(kept)
        stay = num_ended * LEAVING_SHARE < len(self.going_B)
        return None if stay else kept


# ModelRows and BranchedRows make one decode step for all rows: int64 [B], the next token of each row ->
# (logits [B, V], the rows' new order as indices into the old one; None: unchanged).


class ModelRows:
    """By the model, one row for each completion."""

    def __init__(self, read: _Forward, prompt_of: Tensor) -> None:
        self.read = read
        self.select(prompt_of)

    def __call__(self, ids_B: Tensor) -> tuple[Tensor, None]:
        return self.read(ids_B[:, None]), None

    def select(self, rows_B: Tensor) -> None:
        """Keep these rows alone."""
        self.read.select(rows_B)


class BranchedRows:
    """By a packed decoder, once for all rows with the same tokens so far: the lower the entropy, the
    longer completions of one prompt share their computation."""

    def __init__(
        self,
        decoder: PackedDecoder,
        cache: Cache,
        mask_UP: Tensor,
        prompt_of: Tensor,
        num_tokens: int,
    ) -> None:
        self.branches = Branches(
            decoder, cache, mask_UP, num_rows=len(prompt_of), num_tokens=num_tokens
        )
        self.branch_of_B: Tensor | None = prompt_of  # None: the rows are the branches, in order

    def __call__(self, ids_B: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.branch_of_B is None:  # all differ, and will not be equal again
            return self.branches(ids_B), None
        ids_N, self.branch_of_B = self._split(ids_B, self.branch_of_B)
        logits_NV = self.branches(ids_N)
        if len(self.branches) < len(ids_B):
            return logits_NV.index_select(0, self.branch_of_B), None
        order_B, self.branch_of_B = self.branch_of_B.argsort(), None
        return logits_NV, order_B

    def _split(self, ids_B: Tensor, branch_of_B: Tensor) -> tuple[Tensor, Tensor]:
        """(the next token of each branch, the branch of each row). Of the different tokens drawn after
        one branch the first stays in its place; for each of the others it is copied."""
        base = int(ids_B.max()) + 1
        pairs, pair_of_B = (branch_of_B * base + ids_B).unique(return_inverse=True)
        parents = pairs // base
        is_new = torch.zeros_like(parents, dtype=torch.bool)
        is_new[1:] = parents[1:] == parents[:-1]
        places = torch.where(is_new, len(self.branches) - 1 + is_new.cumsum(0), parents)
        self.branches.copy(parents[is_new])
        ids_N = torch.empty_like(pairs).index_copy_(0, places, pairs % base)
        return ids_N, places.index_select(0, pair_of_B)

    def select(self, rows_B: Tensor) -> None:
        kept = rows_B
        if self.branch_of_B is not None:
            branch_of_B = self.branch_of_B.index_select(0, rows_B)
            kept, self.branch_of_B = branch_of_B.unique(return_inverse=True)
        self.branches.select(kept, num_rows=len(rows_B))


def cached_windows(config: Any) -> list[int | None]:
    """Tokens that the cache of each layer keeps; None: all of them."""
    return [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]


class _Forward:
    """The model with its cache: tokens that follow what each row has read -> logits."""

    def __init__(self, model: Any, mask_UP: Tensor, num_tokens: int) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config)
        # Layers that keep every token get memory ahead; sliding layers, which drop tokens, stay.
        layers = self.cache.layers
        self.cache.layers = [PreallocatedLayer() if type(x) is DynamicLayer else x for x in layers]
        self.mask_BS = torch.nn.functional.pad(mask_UP, (0, num_tokens), value=1)
        self.num_read = 0
        accepted = inspect.signature(model.forward).parameters
        # Models with ALiBi or learned positions may count positions from the mask themselves.
        self.takes_positions = "position_ids" in accepted
        # Set here, whatever the model's config says about caches.
        self.options: dict[str, Any] = {"use_cache": True, "return_dict": True}
        self.options[cache_argument(model)] = self.cache
        if "logits_to_keep" in accepted:
            self.options["logits_to_keep"] = 1

    def __call__(self, ids_Bn: Tensor) -> Tensor:
        """int64 [B, n] -> the logits [B, V] behind the last token."""
        start, self.num_read = self.num_read, self.num_read + ids_Bn.shape[1]
        mask_BS = self.mask_BS[:, : self.num_read]
        if self.takes_positions:
            positions_BS = (mask_BS.cumsum(-1) - 1).clamp(min=0)
            self.options["position_ids"] = positions_BS[:, start:]
        outputs = self.model(input_ids=ids_Bn, attention_mask=mask_BS, **self.options)
        return outputs.logits[:, -1]

    def select(self, rows_B: Tensor) -> None:
        """Go on with these rows alone, some maybe several times."""
        self.cache.reorder_cache(rows_B)  # pyright: ignore[reportArgumentType]
        self.mask_BS = self.mask_BS.index_select(0, rows_B)


# --- cache ----------------------------------------------------------------------------------------


class PreallocatedLayer(DynamicLayer):
    """Keys and values [B, heads, length, head size], views of a buffer that is longer."""

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
            buffer = new.new_empty(*new.shape[:-2], length + GROWTH, new.shape[-1])
            if held is not None and before:
                buffer[..., :before, :] = held
            self.buffers[name] = buffer
        buffer[..., before:length, :] = new
        return buffer[..., :length, :]

    def reorder_cache(self, beam_idx: Any) -> None:
        self.buffers.clear()  # keys and values leave them
        super().reorder_cache(beam_idx)
