"""Inputs for the benchmarks of the policy loss: what a real policy looks like, without a model.

Legend: N tokens, V vocabulary, D hidden.
"""

import argparse
import math
from typing import NamedTuple

import torch
from torch import Tensor

from exgrpo_kernels import linear_logprob

CHUNK = 256
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Batch(NamedTuple):
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    advantages: Tensor
    behaviour_logprobs: Tensor
    weights: Tensor


def realistic_head(tokens: int, vocab: int, hidden: int, generator: torch.Generator):
    """(N, D), (V, D) of a policy that is nearly certain of most tokens, without any model.

    The weight is noise plus a Zipf unigram along one direction u. Each row chooses 12 candidates
    from the unigram and how the mass is shared: half the rows leave 1e-5 .. 1e-2 to others than
    their first choice, 30 % up to 0.12, 20 % up to 0.6, and 15 % of what is left goes to the
    tail. Solving a 12 x 12 system gives the hidden state with those logits.
    """
    candidates, tail_share = min(12, vocab), 0.15

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    u = torch.nn.functional.normalize(torch.randn(hidden, generator=generator), dim=0)
    unigram = -1.15 * torch.log(torch.arange(vocab) + 3.0)
    unigram = (unigram - unigram.mean()).double()
    noise = torch.randn(vocab, hidden, generator=generator) / math.sqrt(hidden)
    noise -= (noise @ u)[:, None] * u
    weight = noise + unigram.float()[:, None] * u

    kind = uniform(tokens)
    rest = torch.where(
        kind < 0.5,
        10 ** (-5 + 3 * uniform(tokens)),
        torch.where(kind < 0.8, 0.01 + 0.11 * uniform(tokens), 0.12 + 0.48 * uniform(tokens)),
    )
    shares = torch.arange(1, candidates).double() ** -1.4
    shares = (1 - tail_share) * rest[:, None] * shares / shares.sum()
    wanted = torch.cat([(1 - rest)[:, None], shares], 1).log()
    wanted += (torch.logsumexp(unigram, 0) - (tail_share * rest).log())[:, None]

    states = []
    for rows in torch.arange(tokens).split(CHUNK):
        odds = torch.softmax(unigram, 0).expand(len(rows), -1)
        chosen = torch.multinomial(odds, candidates, generator=generator)
        basis = noise[chosen].double()
        gram = basis @ basis.transpose(1, 2) + 1e-9 * torch.eye(candidates)
        coefficients = torch.linalg.solve(gram, wanted[rows] - unigram[chosen])
        states.append(u + (coefficients[:, None] @ basis).squeeze(1).float())
    return torch.cat(states), weight


def make_batch(arguments: argparse.Namespace) -> Batch:
    """Drawn on the device: one CPU thread takes a minute for 8,192 tokens of a 152k vocabulary."""
    with torch.device(arguments.device):
        return _draw(arguments)


def _draw(arguments: argparse.Namespace) -> Batch:
    generator = torch.Generator(arguments.device).manual_seed(arguments.seed)
    tokens, vocab = arguments.tokens, arguments.vocab
    if arguments.inputs == "realistic":
        hidden, weight = realistic_head(tokens, vocab, arguments.hidden, generator)
    else:
        hidden = torch.randn(tokens, arguments.hidden, generator=generator)
        weight = torch.randn(vocab, arguments.hidden, generator=generator)
        weight /= math.sqrt(arguments.hidden)
    dtype = DTYPES[arguments.dtype]
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    targets = torch.cat(
        [
            torch.multinomial(torch.softmax((h @ weight.t()).float(), -1), 1, generator=generator)
            for h in hidden.split(CHUNK)
        ]
    ).squeeze(1)
    logprobs = linear_logprob(hidden, weight, targets).logprobs
    advantages = torch.randn(tokens, generator=generator)
    silent = torch.rand(tokens, generator=generator) < arguments.zero_advantages
    behaviour = logprobs + 0.05 * torch.randn(tokens, generator=generator)
    batch = Batch(
        hidden,
        weight,
        targets,
        advantages.masked_fill(silent, 0.0),
        behaviour,
        torch.full((tokens,), 1.0 / tokens),
    )
    batch.hidden.requires_grad_()
    batch.weight.requires_grad_()
    return batch
