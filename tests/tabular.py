"""A policy and a prior as tables, small enough to enumerate every response; float64.

States are the prefixes of a response, by length and then lexicographic, i their index. The policy's
logits are sin(1.3 i + 2.1 a + 0.7), the prior's differ by 0.9 cos(0.9 i + 1.7 a). A response is right
if (3 o0 + 5 o1 + 7 o2) mod 4 = 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from exgrpo_fast.experience.prior.triggers import Trigger


class Path(NamedTuple):
    """One response with the flags of its tokens."""

    tokens: tuple[int, ...]
    redrawn_T: Tensor
    old_T: Tensor  # log-probs of its tokens under policy, prior and the behaviour law
    prior_T: Tensor
    mu_T: Tensor
    probability: float  # of tokens and flags together
    reward: float


class Tabular:
    """`num_tokens` tokens, completions of `horizon` of them."""

    def __init__(self, trigger: Trigger, num_tokens: int = 4, horizon: int = 3) -> None:
        tokens = range(num_tokens)
        prefixes = [s for t in range(horizon) for s in itertools.product(tokens, repeat=t)]
        self.index = {prefix: i for i, prefix in enumerate(prefixes)}
        self.completions = list(itertools.product(tokens, repeat=horizon))
        i = torch.arange(len(prefixes), dtype=torch.float64)[:, None]
        a = torch.arange(num_tokens, dtype=torch.float64)
        logits = torch.sin(1.3 * i + 2.1 * a + 0.7)
        self.logp_SV = logits.log_softmax(-1)
        self.logr_SV = (logits + 0.9 * torch.cos(0.9 * i + 1.7 * a)).log_softmax(-1)
        self.law = trigger.law(self.logp_SV, self.logr_SV)

    def states(self, tokens: tuple[int, ...]) -> list[int]:
        return [self.index[tokens[:t]] for t in range(len(tokens))]

    def along(self, table_SV: Tensor, tokens: tuple[int, ...]) -> Tensor:
        return table_SV[self.states(tokens), list(tokens)]

    def paths(self) -> Iterator[Path]:
        """Every response with every possible pattern of flags."""
        for tokens in self.completions:
            kept, redrawn, logp, logr, mu = (
                self.along(table, tokens)
                for table in (
                    self.law.kept_NV,
                    self.law.redrawn_NV,
                    self.logp_SV,
                    self.logr_SV,
                    self.law.emitted_NV.log(),
                )
            )
            reward = float((3 * tokens[0] + 5 * tokens[1] + 7 * tokens[2]) % 4 == 1)
            for flags in itertools.product((False, True), repeat=len(tokens)):
                flags_T = torch.tensor(flags)
                probability = float(torch.where(flags_T, redrawn, kept).prod())
                if probability:
                    yield Path(tokens, flags_T, logp, logr, mu, probability, reward)

    def score(self, tokens: tuple[int, ...], weights_T: Tensor) -> Tensor:
        """sum_t w_t grad log p(y_t | s_t), with respect to all logits, flat."""
        gradient_SV = torch.zeros_like(self.logp_SV)
        for state, token, weight in zip(self.states(tokens), tokens, weights_T, strict=True):
            gradient_SV[state] -= weight * self.logp_SV[state].exp()
            gradient_SV[state, token] += weight
        return gradient_SV.flatten()

    def moments(self, estimate: Callable[[Path], Tensor]) -> tuple[Tensor, float]:
        """(expectation, trace of the covariance) of a gradient estimate under the behaviour law."""
        mean, square = torch.zeros(self.logp_SV.numel(), dtype=torch.float64), 0.0
        for path in self.paths():
            gradient = estimate(path)
            mean += path.probability * gradient
            square += path.probability * float(gradient @ gradient)
        return mean, square - float(mean @ mean)

    def on_policy(self) -> tuple[Tensor, float]:
        """The same of REINFORCE under the policy's own law: the true gradient."""
        ones = torch.ones(len(self.completions[0]), dtype=torch.float64)
        mean, square = torch.zeros(self.logp_SV.numel(), dtype=torch.float64), 0.0
        for tokens in self.completions:
            if (3 * tokens[0] + 5 * tokens[1] + 7 * tokens[2]) % 4 == 1:
                gradient = self.score(tokens, ones)
                probability = float(self.along(self.logp_SV, tokens).sum().exp())
                mean += probability * gradient
                square += probability * float(gradient @ gradient)
        return mean, square - float(mean @ mean)
