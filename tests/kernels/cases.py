"""Cases of the fused losses, and the rule that a backend has to keep on each of them.

The yardstick is float64 autograd of the full logits. An output may be off by twice what plain
PyTorch in the dtype of the inputs is off, plus 1e-6 and one rounding to its own dtype. A tensor of
a few numbers may be exact by luck, so plain PyTorch counts as off by at least what one float32
rounding of the largest logit does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exgrpo_kernels import (
    PolicyObjective,
    linear_logprob,
    linear_logprob_reference,
    linear_policy_loss,
    linear_policy_loss_reference,
    policy_loss,
    policy_loss_from_logits,
    runtime,
)
from exgrpo_kernels.linear_logprob import logprob_reference

if runtime.is_interpreting():
    from interpreter import prepare_interpreter

    prepare_interpreter()

F64 = torch.float64

OBJECTIVES: dict[str, dict[str, Any]] = {
    "clip": {},
    "no_clip": {"clip_low": None, "clip_high": None},
    "dual_clip": {"dual_clip": 1.5},
    "cispo": {"surrogate": "cispo"},
    "sapo": {"surrogate": "sapo", "sapo_temperature_negative": 2.0},
    "reinforce": {"surrogate": "reinforce"},
    "k1": {"kl_coef": 0.2, "kl_estimator": "k1"},
    "k2": {"kl_coef": 0.2, "kl_estimator": "k2"},
    "k3": {"kl_coef": 0.2, "kl_estimator": "k3"},
    "k3_ratio": {"kl_coef": 0.2, "kl_estimator": "k3_ratio"},
    "k3_plus": {"kl_coef": 0.2, "kl_estimator": "k3_plus"},
    "abs": {"kl_coef": 0.2, "kl_estimator": "abs"},
    "dppo": {"clip_low": None, "clip_high": None, "tv_low": 0.002, "tv_high": 0.001}
    | {"kl_coef": 0.2, "kl_estimator": "k2"},
    "dppo_cispo": {"surrogate": "cispo", "clip_high": 2.0, "tv_low": 0.002, "tv_high": 0.001},
    "entropy": {"entropy_coef": 0.3},
    "everything": {"dual_clip": 1.5, "kl_coef": 0.1, "entropy_coef": 0.05},
    "gspo": {"ratio_level": "sequence"},
    "gspo_k3_ratio": {"ratio_level": "sequence", "kl_coef": 0.2, "kl_estimator": "k3_ratio"},
    "gspo_sapo": {"ratio_level": "sequence", "surrogate": "sapo", "entropy_coef": 0.1},
}
# Log-ratios far from every bound of a clip, so that rounding cannot move a row across one.
LOG_RATIOS = torch.tensor([-25.0, -0.7, -0.05, 0.0, 0.1, 0.9, 25.0], dtype=F64)


@dataclass(frozen=True)
class Case:
    """One call, all of whose values follow from these fields."""

    seed: int = 0
    objective: str = "clip"
    num_rows: int = 5
    num_tokens: int = 130
    num_hidden: int = 4
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = None  # None: that of the hidden states
    logits_dtype: torch.dtype | None = None
    scale: float = 1.0
    certain: bool = False
    softcap: float | None = None
    temperature: float | str = 1.0
    bias: str = "none"
    kept: int = 0  # the most ids that a row keeps; 0: all of them
    masked: float = 0.0
    silent: float = 0.0
    shaped: bool = False
    kl_weighted: bool = False
    dirty: bool = False
    strided: bool = False
    extreme: bool = True  # ratios of exp(20), beside which a mistake in the other rows is rounding
    device: str = "cpu"

    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed)


@dataclass
class Batch:
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    temperature: float | Tensor
    kept_ids: Tensor | None
    columns: dict[str, Any]
    objective: PolicyObjective


def make_batch(case: Case) -> Batch:
    """Drawn on the device: a CPU would take minutes for the head of a large vocabulary."""
    with torch.device(case.device):
        return _draw(case)


def _draw(case: Case) -> Batch:
    generator = case.generator()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    n, v, d = case.num_rows, case.num_tokens, case.num_hidden
    hidden, weight = case.scale * normal(n, d), normal(v, d) / math.sqrt(d)
    if case.logits_dtype is not None:
        # exact products, or the order of a sum would decide how a logit is rounded
        hidden, weight = ((8 * t).round() / 8 for t in (hidden, weight))
    targets = torch.randint(v, (n,), generator=generator)
    if case.certain and n:
        # the first half of the rows is nearly certain of its target
        direction = weight[targets[: n // 2]]
        hidden[: n // 2] = 12.0 * direction / direction.square().sum(-1, keepdim=True)
    bias = None
    if case.bias != "none":
        bias = normal(v).to(torch.float32)
        if case.bias == "absent":
            absent = torch.rand(v, generator=generator) < 0.3
            absent[targets] = False
            bias = bias.masked_fill(absent, -math.inf)
    temperature: float | Tensor = 1.0
    if case.temperature == "rows":
        temperature = 0.5 + torch.rand(n, generator=generator)
    else:
        temperature = float(case.temperature)
    kept_ids = kept_sets(case, targets, generator) if case.kept else None
    hidden, weight = hidden.to(case.dtype), weight.to(case.weight_dtype or case.dtype)
    truth = linear_logprob_reference(
        hidden.double(),
        weight.double(),
        targets,
        bias=None if bias is None else bias.double(),
        temperature=temperature,
        softcap=case.softcap,
        logits_dtype=case.logits_dtype,
        kept_ids=kept_ids,
    )
    log_ratios = (LOG_RATIOS if case.extreme else LOG_RATIOS[1:-1]).to(case.device)
    picked = torch.randint(len(log_ratios), (n,), generator=generator)
    weights = 0.1 + torch.rand(n, generator=generator)
    advantages = normal(n).float()
    weights[torch.rand(n, generator=generator) < case.masked] = 0.0
    advantages[torch.rand(n, generator=generator) < case.silent] = 0.0
    sequence_ids = torch.arange(n) // 3
    columns = {
        "behaviour_logprobs": (truth.logprobs - log_ratios[picked]).float(),
        "ref_logprobs": (truth.logprobs - log_ratios[picked.flip(0)] / 2).float(),
        "advantages": advantages,
        "weights": weights,
        "sequence_ids": sequence_ids,
    }
    objective = PolicyObjective(**OBJECTIVES[case.objective])
    if objective.ratio_level == "sequence":
        # one ratio for all tokens of a sequence, as means could come near a bound
        shared = log_ratios[picked[sequence_ids * 3]] if n else log_ratios[:0]
        columns["behaviour_logprobs"] = (truth.logprobs - shared).float()
    if case.shaped:
        chosen = torch.rand(n, generator=generator) < 0.5
        columns["shaping"] = torch.where(chosen, 0.1, 0.0)
    if objective.kl_estimator == "abs":
        # its slope jumps at a gap of 0, which rounding would make positive or negative
        columns["ref_logprobs"] += 0.01
    if objective.kl_estimator == "k3_ratio" and case.extreme:
        # a ratio of exp(20) times a gap of 0 is exp(20) times the rounding of that gap
        columns["ref_logprobs"] -= 1.0
    if case.kl_weighted:
        columns["kl_weights"] = (2 * torch.rand(n, generator=generator) - 0.5).clamp(min=0.0)
    if case.dirty:
        dirt = weights == 0
        hidden[dirt] = math.nan
        targets[dirt] = -100
        columns["advantages"][dirt] = math.inf
        columns["behaviour_logprobs"][dirt] = math.nan
    if case.strided:
        hidden = torch.cat([hidden, hidden], 1)[:, ::2] if d > 1 else hidden.t().contiguous().t()
        weight = weight.t().contiguous().t()
    return Batch(hidden, weight, targets, bias, temperature, kept_ids, columns, objective)


def kept_sets(case: Case, targets: Tensor, generator: torch.Generator) -> Tensor:
    """[N, K] in any order, -1 behind the last: the target and others; every third row keeps all."""
    n, width = case.num_rows, min(case.kept, case.num_tokens)
    order = torch.rand(n, case.num_tokens, generator=generator)
    order.scatter_(1, targets[:, None], -1.0)  # the target is among the first
    kept = order.argsort(1)[:, :width]
    counts = torch.randint(1, width + 1, (n, 1), generator=generator)
    kept = kept.masked_fill(torch.arange(width) >= counts, -1)
    kept[::3] = -1
    return kept.to(torch.int32)


Outputs = dict[str, Tensor]


def run_loss(function: Any, batch: Batch, case: Case, dtype: torch.dtype | None, **more) -> Outputs:
    """All that one call of a linear loss gives, with its inputs in `dtype`, clean rows only."""
    clean = batch.columns["weights"] != 0

    def leaf(value: Tensor) -> Tensor:
        return (value if dtype is None else value.to(dtype)).detach().requires_grad_()

    hidden, weight = leaf(batch.hidden), leaf(batch.weight)
    columns, bias, temperature = batch.columns, batch.bias, batch.temperature
    if dtype == F64:
        columns = {k: c if k == "sequence_ids" else c.double() for k, c in columns.items()}
        bias = None if bias is None else bias.double()
    result = function(
        hidden,
        weight,
        batch.targets,
        bias=bias,
        temperature=temperature,
        softcap=case.softcap,
        logits_dtype=case.logits_dtype,
        kept_ids=batch.kept_ids,
        objective=batch.objective,
        **columns,
        **more,
    )
    wanted = [hidden, weight]
    dhidden, dweight = torch.autograd.grad(result.loss, wanted)
    outputs = {"dhidden": dhidden, "dweight": dweight, "loss": result.loss.detach()[None]}
    outputs |= {name: result.metrics[name][None] for name in ("approx_kl", "ratio_mean")}
    return outputs | {"logprobs": result.logprobs[clean], "entropy": result.entropy[clean]}


def logit_rounding(batch: Batch) -> float:
    """One float32 rounding of the largest finite logit."""
    logits = batch.hidden.double().nan_to_num(0.0) @ batch.weight.double().t()
    if batch.bias is not None:
        logits = logits + batch.bias.nan_to_num(neginf=0.0)
    if logits.numel() == 0:
        return 0.0
    largest = logits.abs().max().item() / float(torch.as_tensor(batch.temperature).min())
    return torch.finfo(torch.float32).eps * largest


def ratio_rounding(batch: Batch, logprobs: Tensor) -> float:
    """One float32 rounding of the largest log-ratio; `logprobs`: of the clean rows.

    exp(x) has the absolute error of x as its relative one: a ratio of exp(12) loses four bits.
    """
    if logprobs.numel() == 0:
        return 0.0
    clean = batch.columns["weights"] != 0
    others = (batch.columns[name][clean] for name in ("behaviour_logprobs", "ref_logprobs"))
    largest = max((logprobs - other.double()).abs().max().item() for other in others)
    return torch.finfo(torch.float32).eps * largest


def assert_keeps_the_rule(ours: Outputs, plain: Outputs, truth: Outputs, rounding: float) -> None:
    """At most twice the error of plain PyTorch, which counts as `rounding`, relative, at least:
    for a tensor of a few numbers it is sometimes exact by luck."""
    for name, value in ours.items():
        expected = truth[name].double()
        if expected.numel() == 0:
            assert value.shape == truth[name].shape
            continue
        assert not value.isnan().any(), f"{name} holds NaN"
        held = expected.to(value.dtype).isfinite()  # by the dtype: float16 ends at 65504
        assert value[~held].isinf().all(), f"{name} is finite where its dtype cannot hold it"
        if not held.any():
            continue
        expected = expected[held]
        error = (value[held].double() - expected).abs().max().item()
        size = max(1.0, expected.abs().max().item())
        off = (plain[name][held].double() - expected).abs().nan_to_num(0.0).max().item()
        allowed = 2.0 * max(off, rounding * size)
        low = value.dtype in (torch.bfloat16, torch.float16)
        allowed += (1e-6 + (torch.finfo(value.dtype).eps if low else 0.0)) * size
        assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g}"


def check_policy_loss(case: Case, backend: str, **arguments) -> None:
    """`linear_policy_loss` on one case."""
    batch = make_batch(case)
    ours = run_loss(linear_policy_loss, batch, case, None, backend=backend, **arguments)
    common = torch.promote_types(batch.hidden.dtype, batch.weight.dtype)
    plain = run_loss(linear_policy_loss_reference, batch, case, common)
    truth = run_loss(linear_policy_loss_reference, batch, case, F64)
    rounding = logit_rounding(batch) + ratio_rounding(batch, truth["logprobs"])
    assert_keeps_the_rule(ours, plain, truth, rounding)
    dead = batch.columns["weights"] == 0
    if batch.objective.kl_coef == 0 and batch.objective.entropy_coef == 0:
        dead = dead | (batch.columns["advantages"] == 0)
    if batch.objective.ratio_level == "token":
        assert torch.count_nonzero(ours["dhidden"][dead]) == 0


def check_logprob(case: Case, backend: str) -> None:
    """`linear_logprob` on one case, with gradients through all three outputs."""
    batch = make_batch(case)
    upstream = torch.randn(3, case.num_rows, generator=case.generator(), device=case.device)

    def run(function: Any, dtype: torch.dtype | None, **more) -> Outputs:
        tensors = [batch.hidden, batch.weight]
        hidden, weight = (
            (t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in tensors
        )
        bias = batch.bias if dtype is None or batch.bias is None else batch.bias.to(dtype)
        out = function(
            hidden,
            weight,
            batch.targets,
            bias=bias,
            temperature=batch.temperature,
            softcap=case.softcap,
            logits_dtype=case.logits_dtype,
            kept_ids=batch.kept_ids,
            **more,
        )
        total = sum((u.to(o.dtype) * o).sum() for u, o in zip(upstream, out, strict=True))
        dhidden, dweight = torch.autograd.grad(total, [hidden, weight])  # type: ignore[arg-type]
        return {k: v.detach() for k, v in out._asdict().items()} | {
            "dhidden": dhidden,
            "dweight": dweight,
        }

    ours = run(linear_logprob, None, backend=backend)
    plain, truth = run(linear_logprob_reference, None), run(linear_logprob_reference, F64)
    assert_keeps_the_rule(ours, plain, truth, logit_rounding(batch))


def check_from_logits(case: Case, backend: str) -> None:
    """`policy_loss_from_logits` on the logits of one case."""
    batch = make_batch(case)
    given = (batch.hidden.double() @ batch.weight.double().t()).to(case.dtype)
    clean = batch.columns["weights"] != 0

    def reference(logits: Tensor, bias: Tensor | None, columns: dict[str, Tensor]):
        usable = torch.where(clean[:, None], logits, 0.0)
        targets = torch.where(clean, batch.targets, 0)
        wide = torch.promote_types(logits.dtype, torch.float32)
        out = logprob_reference(
            usable.to(wide),
            targets,
            bias=bias,
            temperature=batch.temperature,
            softcap=case.softcap,
        )
        return policy_loss(out.logprobs, out.entropy, objective=batch.objective, **columns)

    def run(dtype: torch.dtype, ours: bool) -> Outputs:
        # the multiplication makes it no leaf, as the logits of a model are none
        leaf = given.to(dtype).requires_grad_()
        bias, columns = batch.bias, batch.columns
        if dtype == F64:
            bias = None if bias is None else bias.double()
            columns = {k: c if k == "sequence_ids" else c.double() for k, c in columns.items()}
        if ours:
            result = policy_loss_from_logits(
                leaf * 1.0,
                batch.targets,
                bias=bias,
                temperature=batch.temperature,
                softcap=case.softcap,
                objective=batch.objective,
                backend=backend,
                **columns,
            )
        else:
            result = reference(leaf, bias, columns)
        (dlogits,) = torch.autograd.grad(result.loss, leaf)
        assert result.entropy is not None
        return {
            "dlogits": dlogits[clean],
            "loss": result.loss.detach()[None],
            "logprobs": result.logprobs[clean],
            "entropy": result.entropy[clean],
        }

    ours, plain, truth = run(case.dtype, True), run(case.dtype, False), run(F64, False)
    rounding = logit_rounding(batch) + ratio_rounding(batch, truth["logprobs"])
    assert_keeps_the_rule(ours, plain, truth, rounding)


CHECKS = {
    "policy_loss": check_policy_loss,
    "logprob": check_logprob,
    "from_logits": check_from_logits,
}


def random_case(rng: Any, check: str, device: str = "cpu") -> Case:
    """Any case that `check` accepts; `rng` has the methods of `random.Random`."""
    dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
    rounds = check != "from_logits" and rng.random() < 0.15
    softcap = rng.choice([None, None, 3.0, 30.0])
    return Case(
        seed=rng.randint(0, 10**6),
        objective=rng.choice(sorted(OBJECTIVES)),
        num_rows=rng.randint(0, 6),
        num_tokens=rng.choice([1, 2, 31, 63, 64, 65, 127, 128, 129, 200, 257]),
        num_hidden=rng.choice([1, 2, 3, 8]),
        dtype=dtype,
        logits_dtype=torch.bfloat16 if rounds else None,
        scale=rng.choice([0.1, 1.0] if rounds else [0.1, 1.0, 4.0]),
        certain=not rounds and rng.random() < 0.3,
        softcap=softcap,
        kept=0 if softcap or check == "from_logits" else rng.choice([0, 0, 1, 2, 9]),
        temperature=rng.choice([1.0, 0.6, 1.7, "rows"]),
        bias=rng.choice(["none", "some", "absent"]),
        masked=rng.choice([0.0, 0.3, 1.0]),
        silent=rng.choice([0.0, 0.3]),
        shaped=rng.random() < 0.3,
        kl_weighted=rng.random() < 0.3,
        dirty=check != "logprob" and rng.random() < 0.5,
        strided=rng.random() < 0.3,
        extreme=rng.random() < 0.5,
        device=device,
    )
