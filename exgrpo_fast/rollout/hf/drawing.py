"""One token for each row of logits, by inverse CDF with a number that its request owns.

Legend: B rows, V vocabulary, K tokens that are kept at most.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from exgrpo_fast.rollout.engine import Sampling

LOWEST = -1e4  # of a logit below the highest: its weight is 0, and 0 x -inf would be NaN
BLOCK = 128  # tokens whose probabilities are summed before the CDF is looked up


class Drawn(NamedTuple):
    tokens_B: Tensor
    logprobs_B: Tensor  # float32
    kept_BK: Tensor | None  # what it was drawn from, -1 behind the last; None: no top_k
    entropies_B: Tensor | None = None  # float32, of that distribution; None: not asked for


def draw(logits_BV: Tensor, seeds_B: Tensor, position: int, sampling: Sampling) -> Drawn:
    """One token a row from softmax(logits / temperature), truncated as `sampling` says.

    The uniform number of a row at position t is a hash of (its seed, t). The log-probability is
    that under the distribution that was drawn from.
    """
    logits_BV = logits_BV.float()
    if sampling.temperature == 0.0:
        logprobs_BV = logits_BV.log_softmax(dim=-1)
        drawn_B = logprobs_BV.argmax(dim=-1)
        entropies_B = torch.zeros(len(drawn_B), device=drawn_B.device)
        return Drawn(drawn_B, _pick(logprobs_BV, drawn_B), None, entropies_B)
    if sampling.temperature != 1.0:
        logits_BV = logits_BV / sampling.temperature
    kept_BK = None
    if sampling.top_k > 0:
        logits_BV, kept_BK = keep_top(logits_BV, sampling)
    elif sampling.top_p < 1.0:
        logits_BV = keep_nucleus(logits_BV.log_softmax(dim=-1), sampling.top_p)
    highest_B = logits_BV.amax(dim=-1)
    weights_BV = (logits_BV - highest_B[:, None]).exp_()
    drawn_B, total_B = invert_cdf(weights_BV, hash_uniform(seeds_B, position))
    logprobs_B = _pick(logits_BV, drawn_B) - highest_B - total_B.log()
    entropies_B = None
    if sampling.entropies:
        below_BV = (logits_BV - highest_B[:, None]).clamp_(min=LOWEST)
        entropies_B = total_B.log() - below_BV.mul_(weights_BV).sum(dim=-1) / total_B
    return Drawn(drawn_B, logprobs_B, kept_BK, entropies_B)


def _pick(values_BV: Tensor, index_B: Tensor) -> Tensor:
    return values_BV.gather(1, index_B[:, None])[:, 0]


def invert_cdf(weights_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens [B], total weights [B]): the first token whose cumulated weight exceeds u x total.

    Never one of weight 0. Of whole blocks first, then inside the one that was found: a running
    sum over the vocabulary costs many times as much as a sum.
    """
    sums_Bn = _block_sums(weights_BV)
    cdf_Bn = running_sum(sums_Bn)
    point_B = _below(uniform_B * cdf_Bn[:, -1], cdf_Bn[:, -1])
    block_B = _first_above(cdf_Bn, point_B)
    before_B = _pick(cdf_Bn, block_B) - _pick(sums_Bn, block_B)
    tokens_Bb = block_B[:, None] * BLOCK + torch.arange(BLOCK, device=weights_BV.device)
    last = weights_BV.shape[1] - 1
    inside_Bb = weights_BV.gather(1, tokens_Bb.clamp(max=last)).masked_fill(tokens_Bb > last, 0.0)
    cdf_Bb = running_sum(inside_Bb)
    place_B = _first_above(cdf_Bb, _below((point_B - before_B).clamp(min=0.0), cdf_Bb[:, -1]))
    return (block_B * BLOCK + place_B).clamp(max=last), sums_Bn.sum(dim=-1)


def running_sum(values_Bn: Tensor) -> Tensor:
    """The cumulative sum of each row. CUDA has no deterministic one of floats: where one is asked
    for, log2(n) rounds of additions in a fixed order (Hillis and Steele 1986)."""
    if not (values_Bn.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return values_Bn.cumsum(dim=-1)
    sums_Bn, reach = values_Bn, 1
    while reach < values_Bn.shape[1]:
        sums_Bn = sums_Bn + torch.nn.functional.pad(sums_Bn[:, :-reach], (reach, 0))
        reach *= 2
    return sums_Bn


def _block_sums(weights_BV: Tensor) -> Tensor:
    whole = weights_BV.shape[1] // BLOCK * BLOCK
    sums_Bn = weights_BV[:, :whole].unflatten(1, (-1, BLOCK)).sum(dim=-1) if whole else None
    if sums_Bn is not None and whole == weights_BV.shape[1]:
        return sums_Bn
    rest_B1 = weights_BV[:, whole:].sum(dim=-1, keepdim=True)
    return rest_B1 if sums_Bn is None else torch.cat([sums_Bn, rest_B1], dim=1)


def _below(point_B: Tensor, total_B: Tensor) -> Tensor:
    """u < 1, but u x total may round up to total, behind which only zeros come."""
    return torch.minimum(point_B, torch.nextafter(total_B, torch.zeros_like(total_B)))


def _first_above(cdf_Bn: Tensor, point_B: Tensor) -> Tensor:
    found_B = torch.searchsorted(cdf_Bn, point_B[:, None], right=True)[:, 0]
    return found_B.clamp(max=cdf_Bn.shape[1] - 1)  # NaN sorts behind all


def keep_top(logits_BV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(logits, -inf outside of the kept set; its ids [B, K]): min-p, then top-k, then top-p.

    The order is vLLM's. Of equal logits at the edge of top-k any may be kept, so at most K are.
    """
    values_BK, ids_BK = logits_BV.topk(min(sampling.top_k, logits_BV.shape[1]))
    if sampling.min_p > 0.0:
        lowest_B1 = values_BK[:, :1] + math.log(sampling.min_p)
        values_BK = values_BK.masked_fill(values_BK < lowest_B1, -torch.inf)
    probs_BK = values_BK.softmax(dim=-1)
    if sampling.top_p < 1.0:
        before_BK = running_sum(probs_BK) - probs_BK
        values_BK = values_BK.masked_fill(before_BK >= sampling.top_p, -torch.inf)
    kept_BV = torch.full_like(logits_BV, -torch.inf).scatter_(1, ids_BK, values_BK)
    return kept_BV, ids_BK.masked_fill(values_BK == -torch.inf, -1)


def keep_nucleus(logprobs_BV: Tensor, top_p: float) -> Tensor:
    """Renormalise over the smallest set of tokens with probability >= top_p."""
    if top_p >= 1.0:
        return logprobs_BV
    sorted_BV, order_BV = logprobs_BV.sort(dim=-1, descending=True)
    before_BV = running_sum(sorted_BV.exp()) - sorted_BV.exp()
    dropped_BV = torch.zeros_like(before_BV, dtype=torch.bool)
    dropped_BV.scatter_(1, order_BV, before_BV >= top_p)
    return logprobs_BV.masked_fill(dropped_BV, -torch.inf).log_softmax(dim=-1)


# --- random numbers -------------------------------------------------------------------------------


def hash_uniform(seeds_B: Tensor, position: int) -> Tensor:
    """int64 [B], t -> float32 [B] in (0, 1): SplitMix64 (Steele, Lea, Flood 2014) of seed + t."""
    z = seeds_B + signed((position + 1) * 0x9E3779B97F4A7C15 % (1 << 64))
    z = (z ^ _shift(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * signed(0x94D049BB133111EB)
    z = z ^ _shift(z, 31)
    return (_shift(z, 41).float() + 0.5) / (1 << 23)  # 23 bits and a half are exact in float32


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift right (torch's is arithmetic)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def signed(word: int) -> int:
    """An unsigned 64-bit word as the int64 with the same bits."""
    return word - (1 << 64) if word >= 1 << 63 else word
