"""The loss of one token, and the two row scalars it sends back to the logits.

Everything here acts on vectors of N tokens; nothing knows about hidden states or a vocabulary.
The loss mathematics of the project is written here, once: each loss in `token_losses`, its
derivative beside it for `row_scalars`. The Triton row kernel repeats the derivative of the
token-level losses (`row_kernels.policy_coefficient`); the tests hold all three together.

Legend: N tokens, joined end to end; `ratio` is pi_theta / pi_behaviour of the emitted token, or
of its whole sequence; `shaped` tokens use w / (w + g) in place of the surrogate.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from exgrpo_kernels.runtime import require

RATIO_LEVELS = ("token", "sequence")
SURROGATES = ("clip", "cispo", "sapo", "reinforce")
KL_ESTIMATORS = ("k1", "k2", "k3", "k3_ratio", "k3_plus", "abs")

# exp(20) = 4.9e8: far outside every trust region, and its square is finite in float32.
LOG_RATIO_LIMIT = 20.0


@dataclass(frozen=True)
class PolicyObjective:
    """The loss of one token. All fields are validated; a bad one is a ValueError.

    With r the ratio, A the advantage, lo = 1 - clip_low and hi = 1 + clip_high (None: no bound):

    surrogate   loss of one token                                     source
    clip        -min(r A, clamp(r, lo, hi) A), and for A < 0 at        PPO 1707.06347 eq. 7, DAPO
                least `dual_clip` * A as reward when it is set         2503.14476 eq. 8, dual clip
                                                                       1912.09729 eq. 5
    cispo       -stop_gradient(min(r, hi)) A log pi                    MiniMax-M1 2506.13585 eq. 4
    sapo        -A (4 / t) sigmoid(t (r - 1)), t by the sign of A      SAPO 2511.20347
    reinforce   -A log pi  (A = 1: negative log-likelihood)            Williams 1992

    ratio_level "sequence" takes r = exp(mean over the sequence's trained tokens of log r), with
    the gradient through that mean (GSPO 2507.18071 eq. 6). cispo has no lower bound, as in the
    runs of its paper. Log-ratios are clamped to +-20 before exp, with no gradient beyond.

    tv_low, tv_high (DPPO 2602.04879, binary total variation) silence the surrogate of a token
    whose probability has moved too far, p and q those of theta and of the behaviour policy:
    p - q > tv_high where A > 0, p - q < -tv_low elsewhere. In place of the clip: with "clip" its
    bounds have to be None; "cispo" keeps its cap.

    Added to the surrogate, -entropy_coef * entropy, and kl_coef * KL(theta || ref) by
    `kl_estimator`, with d = log pi_theta - log pi_ref:

    k1, k2, k3  d, d^2 / 2, exp(-d) - 1 + d                            Schulman 2020
    k3_ratio    r k3, whose expected gradient is that of the KL; r     DeepSeek-V3.2 2512.02556,
                with its gradient, before any clip                     the default of TRL
    k3_plus     the value of k3 with the gradient of k2                verl
    abs         |d|                                                    KL-Cov 2505.22617
    """

    clip_low: float | None = 0.2
    clip_high: float | None = 0.28
    dual_clip: float | None = None
    ratio_level: Literal["token", "sequence"] = "token"
    surrogate: Literal["clip", "cispo", "sapo", "reinforce"] = "clip"
    sapo_temperature_positive: float = 1.0
    sapo_temperature_negative: float = 1.05
    kl_coef: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3", "k3_ratio", "k3_plus", "abs"] = "k3"
    entropy_coef: float = 0.0
    tv_low: float | None = None
    tv_high: float | None = None

    def __post_init__(self) -> None:
        for name, accepted in (
            ("ratio_level", RATIO_LEVELS),
            ("surrogate", SURROGATES),
            ("kl_estimator", KL_ESTIMATORS),
        ):
            if getattr(self, name) not in accepted:
                raise ValueError(
                    f"{name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}"
                )
        optional = ("clip_low", "clip_high", "dual_clip", "tv_low", "tv_high")
        required = (
            "sapo_temperature_positive",
            "sapo_temperature_negative",
            "kl_coef",
            "entropy_coef",
        )
        for name in optional + required:
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if isinstance(value, bool | str | None) or not math.isfinite(value):
                accepted = "a finite number" + (" or None" if name in optional else "")
                raise ValueError(f"{name} must be {accepted}, got {value!r}")
        for name in ("clip_low", "clip_high", "tv_low", "tv_high", "kl_coef"):
            if (getattr(self, name) or 0.0) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        for name in ("sapo_temperature_positive", "sapo_temperature_negative"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if self.dual_clip is not None:
            if self.dual_clip <= 1:
                raise ValueError(f"dual_clip must be > 1 or None, got {self.dual_clip}")
            if self.surrogate != "clip":
                raise ValueError(
                    f"dual_clip is part of surrogate='clip'; with surrogate={self.surrogate!r} "
                    "the accepted value is None"
                )
        if self.has_trust_region:
            self._check_trust_region()

    def _check_trust_region(self) -> None:
        if self.surrogate not in ("clip", "cispo") or self.ratio_level != "token":
            raise ValueError(
                "tv_low and tv_high need surrogate='clip' or 'cispo' and ratio_level='token', got "
                f"{self.surrogate!r} and {self.ratio_level!r}"
            )
        bounds = (self.clip_low, self.clip_high, self.dual_clip)
        if self.surrogate == "clip" and bounds != (None, None, None):
            raise ValueError(
                "tv_low and tv_high take the place of the clip: clip_low, clip_high and dual_clip "
                f"must be None, got {bounds}"
            )

    def as_text(self) -> str:
        """The fields as a registered operator takes them; see `from_text`."""
        return " ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))

    @staticmethod
    def from_text(text: str) -> "PolicyObjective":
        words = {"None": None} | {word: word for word in RATIO_LEVELS + SURROGATES + KL_ESTIMATORS}
        pairs = (pair.split("=") for pair in text.split())
        values: dict[str, Any] = {k: words[v] if v in words else float(v) for k, v in pairs}
        return PolicyObjective(**values)

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        low = -math.inf if self.clip_low is None else 1.0 - self.clip_low
        high = math.inf if self.clip_high is None else 1.0 + self.clip_high
        return low, high

    @property
    def has_trust_region(self) -> bool:
        return self.tv_low is not None or self.tv_high is not None

    @property
    def trust_region(self) -> tuple[float, float]:
        """(tv_low, tv_high), infinite where there is no bound."""
        low = math.inf if self.tv_low is None else self.tv_low
        return low, math.inf if self.tv_high is None else self.tv_high


def resolve_objective(objective: PolicyObjective | None) -> PolicyObjective:
    """The objective to use; None is the default one."""
    if objective is None:
        return PolicyObjective()
    if not isinstance(objective, PolicyObjective):
        raise ValueError(f"objective must be a PolicyObjective or None, got {objective!r}")
    return objective


# ---- columns --------------------------------------------------------------------------------------


# Operator schema of the fields of `LossColumns`.
COLUMNS_SCHEMA = "Tensor?[] columns"


@dataclass(frozen=True)
class LossColumns:
    """[N] columns of a loss; those of the public functions, unchecked until `checked`."""

    advantages: Tensor
    behaviour_logprobs: Tensor
    weights: Tensor
    shaping: Tensor | None = None
    ref_logprobs: Tensor | None = None
    sequence_ids: Tensor | None = None
    kl_weights: Tensor | None = None

    @property
    def trained(self) -> Tensor:
        return self.weights != 0

    def arguments(self) -> list[Tensor | None]:
        """The fields in order, as an operator with COLUMNS_SCHEMA takes them."""
        return [getattr(self, f.name) for f in fields(self)]

    def rows(self, rows: slice | Tensor) -> "LossColumns":
        """Some of the rows; where sequence ids are cut, they are numbered again from 0."""
        picked = {f.name: getattr(self, f.name) for f in fields(self)}
        picked = {name: t[rows] for name, t in picked.items() if t is not None}
        if self.sequence_ids is not None and len(picked["weights"]) < len(self.weights):
            picked["sequence_ids"] = picked["sequence_ids"].unique(return_inverse=True)[1]
        return replace(self, **picked)

    def checked(
        self,
        objective: PolicyObjective,
        num_rows: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "LossColumns":
        """The columns in `dtype`, detached, with harmless values in every row of weight 0.

        Those rows are selected away here, before any arithmetic, so whatever they held (NaN, inf)
        reaches neither a value nor a gradient. ValueError names the column.
        """
        shape = f"of shape [{num_rows}]"
        if objective.kl_coef != 0 and self.ref_logprobs is None:
            raise ValueError(f"kl_coef={objective.kl_coef} needs ref_logprobs {shape}")
        if objective.ratio_level == "sequence" and self.sequence_ids is None:
            raise ValueError(f"ratio_level='sequence' needs sequence_ids, int64 {shape}")
        check_vector("weights", self.weights, num_rows, device)
        weights = self.weights.detach().to(dtype)
        trained = weights != 0

        def column(name: str) -> Tensor:
            value = getattr(self, name)
            check_vector(name, value, num_rows, device)
            return torch.where(trained, value.detach().to(dtype), 0.0)

        def optional(name: str) -> Tensor | None:
            return None if getattr(self, name) is None else column(name)

        ids, shaping = checked_ids(self.sequence_ids, trained, device), optional("shaping")
        if shaping is not None:
            # NaN fails this too
            require(shaping.ge(0).all(), "shaping must be >= 0 on every row with a weight")
        return LossColumns(
            advantages=column("advantages"),
            behaviour_logprobs=column("behaviour_logprobs"),
            weights=weights,
            shaping=shaping,
            ref_logprobs=optional("ref_logprobs"),
            # a token-level loss has no use for them, and renumbering those of a chunk waits
            sequence_ids=ids if objective.ratio_level == "sequence" else None,
            kl_weights=optional("kl_weights"),
        )


def check_vector(name: str, value: Tensor, num_rows: int, device: torch.device) -> None:
    """ValueError unless `value` is a floating tensor of shape [num_rows] on `device`."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor of shape [{num_rows}], got {type(value)}")
    if value.shape != (num_rows,):
        raise ValueError(f"{name} must have shape [{num_rows}], got {list(value.shape)}")
    if not value.is_floating_point():
        raise ValueError(f"{name} must be a floating tensor, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")


def checked_ids(ids: Tensor | None, trained: Tensor, device: torch.device) -> Tensor | None:
    """Sequence ids, on `device` or the CPU; 0 in every row that is not trained."""
    if ids is None:
        return None
    num_rows = len(trained)
    if ids.shape != (num_rows,) or ids.dtype != torch.int64:
        raise ValueError(
            f"sequence_ids must be int64 of shape [{num_rows}], got "
            f"{ids.dtype} of shape {list(ids.shape)}"
        )
    if ids.device not in (device, torch.device("cpu")):
        raise ValueError(f"sequence_ids must be on {device} or the CPU, got {ids.device}")
    if ids.device == device:
        ids = torch.where(trained, ids, 0)
    # Segment buffers have N entries, so that their size is known without asking the device.
    in_range = ((ids >= 0) & (ids < num_rows)).all()
    require(in_range, f"sequence_ids must lie in [0, {num_rows}) on every row with a weight")
    return ids


# ---- the loss, written once ----------------------------------------------------------------------


class TokenLosses(NamedTuple):
    """[N] each: weight * loss, ratio, log of the ratio before the clamp, f of the shaped tokens."""

    weighted: Tensor
    ratio: Tensor
    log_ratio: Tensor
    shaped: Tensor | None


def sequence_means(values_N: Tensor, counted_N: Tensor, sequence_ids_N: Tensor) -> Tensor:
    """(N,), (N,) bool, (N,) int64 -> (N,): to every token the mean of its sequence."""
    ids = torch.where(counted_N, sequence_ids_N, 0)
    totals = torch.zeros_like(values_N).index_add(0, ids, torch.where(counted_N, values_N, 0.0))
    counts = torch.zeros_like(values_N).index_add(0, ids, counted_N.to(values_N.dtype))
    return (totals / counts.clamp(min=1.0))[ids]


def surrogate_losses(
    objective: PolicyObjective, ratio: Tensor, logprobs: Tensor, advantages: Tensor
) -> Tensor:
    """(N,) x 3 -> (N,): the policy part of the loss; formulas in `PolicyObjective`."""
    low, high = objective.ratio_bounds
    if objective.surrogate == "clip":
        # The pessimistic minimum bounds the ratio from above for A > 0, from below for A < 0.
        most = math.inf if objective.dual_clip is None else objective.dual_clip
        bounded = torch.where(advantages > 0, ratio.clamp(max=high), ratio.clamp(low, most))
        return -advantages * bounded
    if objective.surrogate == "cispo":
        return -advantages * ratio.detach().clamp(max=high) * logprobs
    if objective.surrogate == "sapo":
        temperature = sapo_temperatures(objective, advantages)
        return -advantages * (4.0 / temperature) * torch.sigmoid(temperature * (ratio - 1.0))
    return -advantages * logprobs


def surrogate_slopes(objective: PolicyObjective, ratio: Tensor, advantages: Tensor) -> Tensor:
    """(N,), (N,) -> (N,): the derivative of `surrogate_losses` in log ratio, or in log pi for
    the surrogates whose ratio carries no gradient."""
    low, high = objective.ratio_bounds
    if objective.surrogate == "clip":
        most = math.inf if objective.dual_clip is None else objective.dual_clip
        above = ratio > torch.where(advantages > 0, high, most)
        return -advantages * ratio.masked_fill(above | ((advantages < 0) & (ratio < low)), 0.0)
    if objective.surrogate == "cispo":
        return -advantages * ratio.clamp(max=high)
    if objective.surrogate == "sapo":
        gate = torch.sigmoid(sapo_temperatures(objective, advantages) * (ratio - 1.0))
        return -advantages * 4.0 * gate * (1.0 - gate) * ratio
    return -advantages


def sapo_temperatures(objective: PolicyObjective, advantages: Tensor) -> Tensor:
    temperature = torch.full_like(advantages, objective.sapo_temperature_negative)
    return temperature.masked_fill(advantages > 0, objective.sapo_temperature_positive)


def left_trust_region(objective: PolicyObjective, logprobs: Tensor, columns: LossColumns) -> Tensor:
    """(N,) -> (N,) bool: tokens that tv_low and tv_high silence. Equality stays inside."""
    low, high = objective.trust_region
    moved = logprobs.detach().exp() - columns.behaviour_logprobs.exp()
    return torch.where(columns.advantages > 0, moved > high, moved < -low)


def kl_losses(
    objective: PolicyObjective, logprobs: Tensor, ratio: Tensor, columns: LossColumns
) -> Tensor:
    """(N,), (N,) -> (N,): the chosen estimator of KL(theta || ref), before `kl_weights`."""
    assert columns.ref_logprobs is not None
    gap = logprobs - columns.ref_logprobs
    if objective.kl_estimator == "k1":
        return gap
    if objective.kl_estimator == "k2":
        return 0.5 * gap.square()
    if objective.kl_estimator == "abs":
        return gap.abs()
    bounded = gap.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    k3 = torch.expm1(-bounded) + bounded
    if objective.kl_estimator == "k3_ratio":
        return ratio * k3
    if objective.kl_estimator == "k3_plus":
        return k3.detach() + gap.detach() * (logprobs - logprobs.detach())
    return k3


def kl_slopes(
    objective: PolicyObjective, logprobs: Tensor, ratio: Tensor, columns: LossColumns
) -> tuple[Tensor, Tensor | None]:
    """(N,), (N,) -> the derivatives of `kl_losses` in log pi, and in the log-ratio (None: 0)."""
    assert columns.ref_logprobs is not None
    gap = logprobs - columns.ref_logprobs
    if objective.kl_estimator == "k1":
        return torch.ones_like(gap), None
    if objective.kl_estimator in ("k2", "k3_plus"):
        return gap, None
    if objective.kl_estimator == "abs":
        return gap.sign(), None
    bounded = gap.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    slopes = -torch.expm1(-bounded).masked_fill(gap.abs() > LOG_RATIO_LIMIT, 0.0)
    if objective.kl_estimator == "k3_ratio":
        return ratio * slopes, ratio * (torch.expm1(-bounded) + bounded)
    return slopes, None


class LogRatios(NamedTuple):
    """[N] each: of the token, of what the surrogate takes, and which tokens share it."""

    of_token: Tensor
    of_surrogate: Tensor
    counted: Tensor
    ids: Tensor | None


def log_ratios(objective: PolicyObjective, logprobs: Tensor, columns: LossColumns) -> LogRatios:
    """(N,) -> log pi_theta / pi_behaviour by token, and by sequence where the objective says so.

    Shaped rows stay at token level and outside the means of their sequence.
    """
    of_token = logprobs - columns.behaviour_logprobs
    counted = columns.trained if columns.shaping is None else columns.trained & ~is_shaped(columns)
    if objective.ratio_level == "token":
        return LogRatios(of_token, of_token, counted, None)
    assert columns.sequence_ids is not None
    ids = columns.sequence_ids.to(logprobs.device, non_blocking=True)
    means = sequence_means(of_token, counted, ids)
    return LogRatios(of_token, torch.where(counted, means, of_token), counted, ids)


def is_shaped(columns: LossColumns) -> Tensor:
    return torch.zeros_like(columns.trained) if columns.shaping is None else columns.shaping > 0


def shaped_ratios(columns: LossColumns, of_token: Tensor) -> Tensor:
    """(N,) -> f(w) = w / (w + g) = sigmoid(log w - log g), exact at any log-ratio, never clamped.

    ExGRPO 2510.02245 eq. 4; one half where nothing is shaped.
    """
    assert columns.shaping is not None
    shaped = is_shaped(columns)
    log_shaping = torch.where(shaped, columns.shaping, 1.0).log()
    return torch.sigmoid(torch.where(shaped, of_token - log_shaping, 0.0))


def token_losses(
    objective: PolicyObjective, logprobs_N: Tensor, entropy_N: Tensor | None, columns: LossColumns
) -> TokenLosses:
    """(N,), (N,) -> weighted losses whose sum is the loss; differentiable in both vectors."""
    trained, advantages = columns.trained, columns.advantages
    logprobs = torch.where(trained, logprobs_N, 0.0)
    ratios = log_ratios(objective, logprobs, columns)
    ratio = ratios.of_surrogate.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    losses, shaped = surrogate_losses(objective, ratio, logprobs, advantages), None
    if objective.has_trust_region:
        losses = losses.masked_fill(left_trust_region(objective, logprobs, columns), 0.0)
    if columns.shaping is not None:
        shaped = shaped_ratios(columns, ratios.of_token)
        losses = torch.where(is_shaped(columns), -advantages * shaped, losses)
    # Advantage 0 is silent even where log pi = -inf would make 0 * inf.
    losses = torch.where(advantages == 0, 0.0, losses)

    if objective.kl_coef != 0:
        kl = kl_losses(objective, logprobs, ratio, columns)
        losses = losses + objective.kl_coef * weighted_kl(kl, columns)
    if objective.entropy_coef != 0:
        assert entropy_N is not None
        losses = losses - objective.entropy_coef * torch.where(trained, entropy_N, 0.0)
    return TokenLosses(columns.weights * losses, ratio, ratios.of_surrogate, shaped)


def weighted_kl(values: Tensor, columns: LossColumns) -> Tensor:
    return values if columns.kl_weights is None else columns.kl_weights * values


@torch.no_grad()
def row_scalars(
    objective: PolicyObjective, logprobs_N: Tensor, entropy_N: Tensor, columns: LossColumns
) -> tuple[Tensor, Tensor | None]:
    """(N,), (N,) -> c1 = dL / d logprob and c2 = -dL / d entropy (None without an entropy term).

    The derivative of `token_losses`, written out because a registered operator runs below
    autograd. With them the gradient in the logits is dz_j = c1 (1[j=y] - p_j) + c2 p_j (log p_j + H).
    """
    trained, advantages, weights = columns.trained, columns.advantages, columns.weights
    logprobs = torch.where(trained, logprobs_N, 0.0)
    ratios = log_ratios(objective, logprobs, columns)
    ratio = ratios.of_surrogate.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    slopes = surrogate_slopes(objective, ratio, advantages)
    if objective.has_trust_region:
        slopes = slopes.masked_fill(left_trust_region(objective, logprobs, columns), 0.0)
    slopes = weights * torch.where(advantages == 0, 0.0, slopes)

    # derivatives in log pi itself, and in the log-ratio, which a whole sequence may share
    direct, of_ratio = torch.zeros_like(slopes), slopes
    if objective.surrogate in ("cispo", "reinforce"):
        direct, of_ratio = slopes, direct
    if columns.shaping is not None:
        shaped = shaped_ratios(columns, ratios.of_token)
        slopes = weights * -advantages * shaped * (1.0 - shaped)
        direct = torch.where(is_shaped(columns), slopes, direct)
        of_ratio = torch.where(is_shaped(columns), 0.0, of_ratio)
    if objective.kl_coef != 0:
        scale = weighted_kl(objective.kl_coef * weights, columns)
        of_logprob, through_ratio = kl_slopes(objective, logprobs, ratio, columns)
        direct = direct + scale * of_logprob
        of_ratio = of_ratio if through_ratio is None else of_ratio + scale * through_ratio
    of_ratio = of_ratio.masked_fill(ratios.of_surrogate.abs() > LOG_RATIO_LIMIT, 0.0)
    if ratios.ids is not None:
        # each token moves the mean log-ratio of its sequence by one part in its length
        means = sequence_means(of_ratio, ratios.counted, ratios.ids)
        of_ratio = torch.where(ratios.counted, means, of_ratio)
    # The slope of a clamp at NaN is 0, which would drop a broken row from the gradients.
    weighted = token_losses(objective, logprobs_N, entropy_N, columns).weighted
    c1 = torch.where(weighted.isnan(), math.nan, direct + of_ratio)
    return c1, objective.entropy_coef * weights if objective.entropy_coef != 0 else None


# ---- metrics -------------------------------------------------------------------------------------


@torch.no_grad()
def loss_metrics(
    objective: PolicyObjective,
    logprobs_N: Tensor,
    entropy_N: Tensor | None,
    columns: LossColumns,
    losses: TokenLosses,
) -> dict[str, Tensor]:
    """0-d tensors on the device of the inputs; means over no token at all are 0.

    num_trained, num_shaped           rows with a weight; those of them that are shaped
    ratio_mean, ratio_max             over the unshaped trained rows, as are the clip fractions:
    clip_frac_low, clip_frac_high     ratio beyond the bound, with no gradient (cispo: capped)
    dual_clip_frac                    A < 0 and ratio beyond dual_clip
    tv_frac                           A not 0, silenced by tv_low or tv_high; where those are set
    log_ratio_clamped                 rows whose log-ratio met the +-20 limit
    approx_kl                         k3 estimate of KL(behaviour || theta), unshaped trained rows
    shaped_mean                       mean f of the shaped rows
    entropy_mean, kl_ref              over the trained rows, when the inputs are there
    """
    trained, advantages, ratio = columns.trained, columns.advantages, losses.ratio
    shaped = is_shaped(columns)
    fresh = trained & ~shaped

    def count(mask: Tensor) -> Tensor:
        return mask.sum().to(ratio.dtype)

    def mean(values: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, values, 0.0).sum() / count(mask).clamp(min=1.0)

    low, high = objective.ratio_bounds
    below = above = beyond = torch.zeros_like(trained)
    if objective.surrogate == "clip":
        most = math.inf if objective.dual_clip is None else objective.dual_clip
        below = fresh & (advantages < 0) & (ratio < low)
        above = fresh & (advantages > 0) & (ratio > high)
        beyond = fresh & (advantages < 0) & (ratio > most)
    elif objective.surrogate == "cispo":
        above = fresh & (ratio > high)
    logprobs = torch.where(trained, logprobs_N, 0.0)
    token_gap = logprobs - columns.behaviour_logprobs
    token_gap = token_gap.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    num_fresh = count(fresh).clamp(min=1.0)
    fresh_ratio = torch.where(fresh, ratio, 0.0)
    metrics = {
        "num_trained": count(trained),
        "num_shaped": count(shaped),
        "ratio_mean": mean(ratio, fresh),
        "ratio_max": fresh_ratio.amax() if len(ratio) else ratio.new_zeros(()),
        "clip_frac_low": count(below) / num_fresh,
        "clip_frac_high": count(above) / num_fresh,
        "dual_clip_frac": count(beyond) / num_fresh,
        "log_ratio_clamped": count(fresh & (losses.log_ratio.abs() > LOG_RATIO_LIMIT)),
        "approx_kl": mean(torch.expm1(token_gap) - token_gap, fresh),
        "shaped_mean": mean(ratio if losses.shaped is None else losses.shaped, shaped),
    }
    if objective.has_trust_region:
        far = left_trust_region(objective, logprobs, columns) & fresh & (advantages != 0)
        metrics["tv_frac"] = count(far) / num_fresh
    if entropy_N is not None:
        metrics["entropy_mean"] = mean(entropy_N, trained)
    if columns.ref_logprobs is not None:
        metrics["kl_ref"] = mean(kl_losses(objective, logprobs, ratio, columns), trained)
    return metrics
