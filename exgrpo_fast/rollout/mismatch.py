"""Engine against trainer: how far the log-probs of the same tokens are apart, and what to do.

d_t = log pi_trainer(y_t) - log pi_engine(y_t), both before the update. The tokens were drawn by
the engine, so importance sampling needs r_t = exp(d_t). Rounding, other kernels and, where
generation runs ahead, older weights make it differ from 1.

    token_truncate      min(r_t, max)                        truncated importance sampling, TIS
    token_mask          r_t where min <= r_t <= max, else 0  with both limits: IcePop
    sequence_truncate   min(r, max), r = exp(sum_t d_t)
    sequence_mask       r where min <= r <= max, else 0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from exgrpo_fast.core.types import Completion

Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
MAX_LOG_RATIO = 20.0  # as in the kernels: beyond it exp says nothing


@dataclass(frozen=True)
class MismatchRule:
    """Limits are ratios of probabilities, trainer over engine."""

    correction: Correction = "none"
    max_ratio: float = 2.0
    min_ratio: float = 0.0

    def factors(self, difference_T: Tensor) -> Tensor | None:
        """float32 [T], for the weights of a completion's tokens; None where nothing is corrected."""
        if self.correction == "none":
            return None
        ratio_T = self._ratio(difference_T)
        if self.correction.endswith("truncate"):
            return ratio_T.clamp(max=self.max_ratio)
        return torch.where(self._outside(ratio_T), 0.0, ratio_T)

    def corrected(self, difference_T: Tensor) -> Tensor:
        """bool [T]: the tokens whose ratio is cut or masked."""
        return self._outside(self._ratio(difference_T))

    def _ratio(self, difference_T: Tensor) -> Tensor:
        if self.correction.startswith("sequence"):
            difference_T = difference_T.sum().expand_as(difference_T)
        return difference_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()

    def _outside(self, ratio_T: Tensor) -> Tensor:
        if self.correction == "none":
            return torch.zeros_like(ratio_T, dtype=torch.bool)
        if self.correction.endswith("truncate"):
            return ratio_T > self.max_ratio
        return (ratio_T < self.min_ratio) | (ratio_T > self.max_ratio)


NO_CORRECTION = MismatchRule()


@dataclass(frozen=True)
class Mismatch:
    """Metrics of the tokens of one step. Differences in nats, staleness in steps."""

    mismatch_mean: float = 0.0  # |d|
    mismatch_p99: float = 0.0
    mismatch_max: float = 0.0
    mismatch_kl: float = 0.0  # KL(engine || trainer), estimator k3: E[exp(d) - 1 - d]
    mismatch_corrected_frac: float = 0.0
    staleness_mean: float = 0.0
    staleness_max: int = 0
    scored_frac: float = 1.0  # completions that the trainer has scored; others are not in it


def measure(
    differences: Sequence[Tensor],
    completions: Sequence[Completion],
    rule: MismatchRule,
    *,
    version: int,
) -> Mismatch:
    """`differences`: d of each completion, [T]; `version`: of the trainer's present weights."""
    if not differences:
        return Mismatch()
    d = torch.cat(list(differences)).double()
    ratio = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    corrected = torch.cat([rule.corrected(of_one) for of_one in differences])
    stale = torch.cat([staleness(completion, version) for completion in completions])
    return Mismatch(
        mismatch_mean=float(d.abs().mean()),
        mismatch_p99=float(np.quantile(d.abs().numpy(), 0.99)),
        mismatch_max=float(d.abs().max()),
        mismatch_kl=float((ratio - 1.0 - d).mean()),
        mismatch_corrected_frac=float(corrected.double().mean()),
        staleness_mean=float(stale.double().mean()),
        staleness_max=int(stale.max()),
    )


def staleness(completion: Completion, version: int) -> Tensor:
    """int64 [T]: for each token, the updates between the weights that drew it and `version`."""
    stale_T = torch.zeros(len(completion.token_ids), dtype=torch.int64)
    for span in completion.weight_spans:
        stale_T[span.start : span.end] = version - span.version
    return stale_T
