"""The fused linear policy loss: from hidden states to gradients, one chunk of logits at a time.

For a token-level loss the coefficients of a row follow from its own log-probability, so its
gradients are made in the forward, while the chunk exists: three GEMMs, no recomputation. A
sequence-level ratio couples rows: where the host can read the sequence ids, chunks hold whole
sequences and the same holds; else all rows are scored first, then the coefficients computed, and
a second pass recomputes the logits: four GEMMs.

The loss itself is `objective.token_losses`; the row algebra is `linear_logprob`'s.
Legend: N tokens, V vocabulary, D hidden.
"""

# pyright: reportIncompatibleMethodOverride=false

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from exgrpo_kernels import runtime
from exgrpo_kernels.linear_head import (
    HEAD_SCHEMA,
    HeadGradients,
    HeadOptions,
    LinearHead,
    LinearLogprob,
    RowCoefficients,
    linear_head,
    write_logits,
)
from exgrpo_kernels.linear_logprob import (
    chunk_buffer,
    chunk_size,
    chunks,
    linear_logprob_reference,
    new_outputs,
    recompute_gradients,
    score_rows,
    store_outputs,
)
from exgrpo_kernels.objective import (
    COLUMNS_SCHEMA,
    LossColumns,
    PolicyObjective,
    check_vector,
    loss_metrics,
    resolve_objective,
    row_scalars,
    token_losses,
)
from exgrpo_kernels.sparse_backward import DEFAULT_THRESHOLD, TAILS, Sparsity, TileSelector

SPARSITIES = ("auto", "off")


class PolicyLoss(NamedTuple):
    """`loss` carries the gradient; logprobs, entropy, ratio [N] and the metrics are detached."""

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor | None
    ratio: Tensor
    metrics: dict[str, Tensor]

    def backward(self) -> None:
        """Short for `self.loss.backward()`."""
        self.loss.backward()


# ---- reference -----------------------------------------------------------------------------------


def linear_policy_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    weights: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    kept_ids: Tensor | None = None,
    sparsity: str | float = "auto",
    tail: str = "drop",
    backend: str = "auto",
    **columns,
) -> PolicyLoss:
    """(N, D), (V, D), (N,) -> scalar: the specification of `linear_policy_loss`, logits in full."""
    trained = weights != 0
    usable = trained | hidden.isfinite().all(-1)
    hidden = torch.where(usable[:, None], hidden, 0.0)
    targets = torch.where(trained | (targets >= 0) & (targets < len(weight)), targets, 0)
    if isinstance(temperature, Tensor):
        temperature = torch.where(trained, temperature, 1.0)
    if kept_ids is not None:
        kept_ids = torch.where(trained[:, None], kept_ids, -1)
    out = linear_logprob_reference(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logits_dtype=logits_dtype,
        kept_ids=kept_ids,
    )
    return policy_loss(out.logprobs, out.entropy, weights=weights, **columns)


# ---- passes over the chunks ----------------------------------------------------------------------


def one_phase_pass(
    head: LinearHead,
    objective: PolicyObjective,
    columns: LossColumns,
    gradients: HeadGradients,
    selector: TileSelector,
    plan: Sequence[slice | Tensor],
) -> LinearLogprob:
    """Statistics and gradients of every row in one pass over the chunks of `plan`."""
    outputs, buffer = new_outputs(head), chunk_buffer(head, len(head), selector)
    for rows in plan:
        chunk = head.rows(rows)
        write_logits(buffer, chunk)
        statistics, gradient = buffer.policy_gradient(chunk.inputs, objective, columns.rows(rows))
        store_outputs(outputs, rows, statistics)
        gradients.add(chunk, gradient, rows, selector)
    return outputs


def row_order(objective: PolicyObjective, columns: LossColumns, targets_N: Tensor) -> Tensor:
    """(N,) -> rows sorted so that neighbours share tiles, from what is known before the logits.

    First those that may have a gradient, by 1 - p of the behaviour policy in powers of two, then
    by target; rows of weight or advantage 0 come last.
    """
    others = -torch.expm1(columns.behaviour_logprobs.float().clamp(-80.0, -1e-9))
    doubt = others.log2().floor().clamp(min=-31.0).long() + 32
    silent = ~columns.trained
    if objective.kl_coef == 0 and objective.entropy_coef == 0:
        silent = silent | (columns.advantages == 0)
    key = silent.long() * 64 + doubt
    return torch.argsort(key * (targets_N.max() + 1) + targets_N, stable=True)


def chunk_plan(
    objective: PolicyObjective, columns: LossColumns, head: LinearHead, *, reorders: bool
) -> Sequence[slice | Tensor] | None:
    """The rows of every chunk of a single pass; None where that cannot be."""
    size = chunk_size(head, len(head))
    if objective.ratio_level == "sequence":
        return sequence_plan(columns, len(head), size)
    if reorders and len(head) > 1:
        return row_order(objective, columns, head.inputs.targets_N).split(size)
    return list(chunks(len(head), size)) or [slice(0, 0)]


def sequence_plan(columns: LossColumns, num_rows: int, chunk_rows: int) -> list[slice] | None:
    """Chunks of whole sequences; None where one is too long, split, or not readable by the host."""
    if num_rows <= chunk_rows:
        return [slice(0, num_rows)]
    ids = columns.sequence_ids
    if ids is None or not runtime.can_read_values(ids.device):
        return None
    # a row that is not trained belongs to whatever sequence is around it
    trained = torch.arange(num_rows, device=ids.device)
    if columns.trained.device == ids.device:
        trained = columns.trained.nonzero().squeeze(1)
    if len(trained) == 0:
        return list(chunks(num_rows, chunk_rows))
    ids = ids[trained]
    is_first = torch.ones_like(ids, dtype=torch.bool)
    is_first[1:] = ids[1:] != ids[:-1]
    starts = trained[is_first]
    if len(starts) != len(ids.unique()):
        return None
    plan, start = [], 0
    ends = [*starts[1:].tolist(), num_rows]
    for begin, end in zip([0, *starts[1:].tolist()], ends, strict=True):
        if end - start > chunk_rows and begin > start:
            plan.append(slice(start, begin))
            start = begin
        if end - start > chunk_rows:
            return None
    return [*plan, slice(start, num_rows)]


# ---- operators: torch.compile and CUDA graphs see one node ---------------------------------------


@torch.library.custom_op(
    "exgrpo_kernels::linear_policy_loss",
    mutates_args=("main_grad",),
    schema=f"({HEAD_SCHEMA}, {COLUMNS_SCHEMA}, str objective, bool[] needs, "
    "Tensor(a!)? main_grad, float? threshold, str tail, bool is_auto) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_policy_loss_operator(*arguments):
    """logprobs, entropy, metrics of the sparsity, and dX, dW, db; empty where not wanted."""
    *head, columns, objective, needs, main_grad, threshold, tail, is_auto = arguments
    head, columns = LinearHead.from_arguments(*head), LossColumns(*columns)
    policy = PolicyObjective.from_text(objective)
    selector = TileSelector(Sparsity(threshold, tail, is_auto), head.hidden_ND.device)
    if not any(needs):
        outputs, made = score_rows(head), (None, None, None)
        selector.count_rows(len(head))
    elif plan := chunk_plan(policy, columns, head, reorders=selector.wants_masses):
        gradients = HeadGradients.like(head, needs, main_grad)
        outputs = one_phase_pass(head, policy, columns, gradients, selector, plan)
        made = gradients.finish(head)
    else:
        # score all rows, find all coefficients, then make each chunk of logits again
        outputs = score_rows(head)
        scalars = row_scalars(policy, outputs.logprobs, outputs.entropy, columns)
        coefficients = RowCoefficients(*scalars)
        made = recompute_gradients(head, outputs, coefficients, needs, main_grad, selector)
    made = (head.hidden_ND.new_empty(0) if g is None else g for g in made)
    return outputs.logprobs, outputs.entropy, selector.metrics(len(head)).float(), *made


@linear_policy_loss_operator.register_fake
def _(hidden, weight, targets, bias, *arguments):
    *rest, _, _, needs, main_grad, _, _, _ = arguments
    outputs = new_outputs(LinearHead.from_arguments(hidden, weight, targets, bias, *rest))
    wanted = needs[0], needs[1] and main_grad is None, needs[2]
    gradients = (
        torch.empty_like(value, memory_format=torch.contiguous_format)
        if needed
        else hidden.new_empty(0)
        for value, needed in zip((hidden, weight, bias), wanted, strict=True)
    )
    return *outputs[:2], hidden.new_empty(3, dtype=torch.float32), *gradients


# ---- autograd ------------------------------------------------------------------------------------


class WithGradients(torch.autograd.Function):
    """Attaches gradients that were made in the forward to a finished loss."""

    @staticmethod
    def forward(ctx, loss, first, second, third, *gradients):
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        # A copy of [V, D] is made only where the gradients are needed again.
        is_one = runtime.is_free_to_read(upstream) and float(upstream) == 1.0
        multiply = Tensor.mul if keeps_graph() else Tensor.mul_
        scaled = (
            g if g is None or is_one else multiply(g, upstream.to(g.dtype))
            for g in ctx.saved_tensors
        )
        return None, *scaled, None, None, None


def keeps_graph() -> bool:
    """Whether this backward pass may be run again (retain_graph); a compiled graph always may."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore


# ---- checks and the finished loss -----------------------------------------------------------------


def check_main_grad(main_grad: Tensor | None, weight: Tensor) -> None:
    """ValueError unless dW can be added to `main_grad`."""
    if main_grad is None:
        return
    fits = main_grad.shape == weight.shape and main_grad.device == weight.device
    if not fits or main_grad.dtype != torch.float32 or not main_grad.is_contiguous():
        raise ValueError(
            f"weight_main_grad must be float32 {list(weight.shape)}, contiguous, on "
            f"{weight.device}, got "
            f"{main_grad.dtype} {list(main_grad.shape)} on {main_grad.device}"
        )


def finished_loss(
    objective: PolicyObjective,
    columns: LossColumns,
    targets: Tensor,
    num_tokens: int,
    logprobs: Tensor,
    entropy: Tensor,
) -> PolicyLoss:
    """The loss of finished rows, and its metrics."""
    is_token = (targets >= 0) & (targets < num_tokens)
    logprobs = torch.where(is_token, logprobs, 0.0)
    losses = token_losses(objective, logprobs, entropy, columns)
    metrics = loss_metrics(objective, logprobs, entropy, columns, losses)
    return PolicyLoss(losses.weighted.sum(), logprobs, entropy, losses.ratio, metrics)


def resolve_sparsity(sparsity: str | float, tail: str, num_tokens: int) -> Sparsity:
    """The arguments `sparsity` and `tail`, checked, for a vocabulary of `num_tokens`."""
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {', '.join(TAILS)}, got {tail!r}")
    if isinstance(sparsity, int | float) and not isinstance(sparsity, bool):
        if not 0.0 <= sparsity < 1.0:
            raise ValueError(f"sparsity as a number must lie in [0, 1), got {sparsity}")
        return Sparsity(float(sparsity), tail, is_auto=False)
    if sparsity not in SPARSITIES:
        raise ValueError(
            f"sparsity must be one of {', '.join(SPARSITIES)} or a number, got {sparsity!r}"
        )
    is_off = sparsity == "off" or num_tokens < runtime.SPARSE_VOCABULARY
    if is_off or torch.are_deterministic_algorithms_enabled():
        return Sparsity(None, tail, is_auto=False)
    return Sparsity(DEFAULT_THRESHOLD, tail, is_auto=True)


def needs_gradients(*inputs: Tensor | None) -> list[bool]:
    """Which of the inputs require a gradient that is to be made now."""
    enabled = torch.is_grad_enabled()
    return [enabled and value is not None and value.requires_grad for value in inputs]


# ---- public --------------------------------------------------------------------------------------


def policy_loss(
    logprobs: Tensor,
    entropy: Tensor | None = None,
    *,
    advantages: Tensor,
    behaviour_logprobs: Tensor,
    weights: Tensor,
    shaping: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    kl_weights: Tensor | None = None,
    objective: PolicyObjective | None = None,
) -> PolicyLoss:
    """(N,), (N,) -> scalar: the objective on vectors of log-probabilities, by plain autograd.

    The columns are those of `linear_policy_loss`. `entropy` may be None when the objective has no
    entropy term. For log-probabilities of `linear_logprob` or of a model that is not of ours.
    """
    objective = resolve_objective(objective)
    num_rows, device = logprobs.numel(), logprobs.device
    check_vector("logprobs", logprobs, num_rows, device)
    if entropy is not None:
        check_vector("entropy", entropy, num_rows, device)
    elif objective.entropy_coef != 0:
        raise ValueError(
            f"entropy_coef={objective.entropy_coef} needs entropy of shape [{num_rows}]"
        )
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    logprobs = logprobs.to(dtype)
    entropy = None if entropy is None else entropy.to(dtype)
    columns = LossColumns(
        advantages, behaviour_logprobs, weights, shaping, ref_logprobs, sequence_ids, kl_weights
    ).checked(objective, num_rows, dtype, device)
    losses = token_losses(objective, logprobs, entropy, columns)
    detached = logprobs.detach(), None if entropy is None else entropy.detach()
    metrics = loss_metrics(objective, *detached, columns, losses)
    return PolicyLoss(losses.weighted.sum(), *detached, losses.ratio.detach(), metrics)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    advantages: Tensor,
    behaviour_logprobs: Tensor,
    weights: Tensor,
    shaping: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    kl_weights: Tensor | None = None,
    objective: PolicyObjective | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    kept_ids: Tensor | None = None,
    weight_main_grad: Tensor | None = None,
    sparsity: str | float = "auto",
    tail: str = "drop",
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> PolicyLoss:
    """(N, D), (V, D), (N,) -> float32 scalar: sum of weights * loss over tokens, never [N, V].

    hidden, weight       bfloat16, float16, float32 or float64 (which makes everything float64)
    targets              int64 [N], the emitted tokens
    advantages           [N], the trajectory's advantage, repeated
    behaviour_logprobs   [N], log-probability under the policy taken to have produced the token
    weights              [N], mask x normaliser x correction; nothing is divided inside
    shaping              [N], 0: the surrogate; g > 0: w / (w + g) with the unclipped ratio w
    ref_logprobs         [N], needed when objective.kl_coef > 0
    sequence_ids         int64 [N] in [0, N), needed when objective.ratio_level is "sequence", else
                         ignored; on the CPU they let chunks hold whole sequences, which saves a GEMM
    kl_weights           [N], multiplies the KL term of each token; None: 1
    objective            `PolicyObjective`, which gives the formulas and their papers
    weight_main_grad     float32 [V, D]: dW is added to it here, and `weight` gets none from
                         autograd; the upstream gradient of the loss must then be 1
    bias, temperature, softcap, logits_dtype, kept_ids, backend   as in `linear_logprob`; with
                         kept_ids behaviour_logprobs, ref_logprobs and the entropy are over them too
    sparsity             "off"; a threshold: tiles of 64 x 64 whose gradient mass stays under it, as
                         a share of the mean |c1|, are not multiplied (`sparse_backward`); "auto":
                         1e-4, and dense where too few tiles would be dropped to pay, for a small
                         vocabulary, and under torch.use_deterministic_algorithms(True). On CUDA
                         "auto" goes by the last density that has arrived: bits may differ
    tail                 what becomes of dropped tiles: "drop"; "centroid", one value per tile;
                         "dense_dw", nothing is dropped from dW
    chunk_rows           at most so many rows of logits at a time; None: by the device. Fewer take
                         less memory, and add to dW [V, D] more often

    A row of weight 0 contributes exactly 0, whatever its inputs hold; a target outside [0, V) is
    legal there and its logprob is reported as 0. The gradients are made here, in the forward, for
    those of hidden, weight, bias that require them; under torch.no_grad() none is made. The
    entropy and log-probabilities come back for all rows, for metrics and for later steps.
    N = 0 is legal: loss 0 and zero gradients.
    Errors: ValueError naming the argument, for shapes, dtypes, devices, settings; values (targets,
    temperature, shaping, sequence_ids, kept_ids, a hidden state that is not finite on a trained row) are
    checked on a CPU. On CUDA the first five are device-side asserts, and the last makes a NaN loss.
    """
    objective = resolve_objective(objective)
    selection = resolve_sparsity(sparsity, tail, len(weight))
    check_main_grad(weight_main_grad, weight)
    check_vector("weights", weights, len(hidden), hidden.device)
    options = HeadOptions(bias, temperature, softcap, logits_dtype, backend, chunk_rows, kept_ids)
    head = linear_head(hidden, weight, targets, options).with_checked_values(weights.detach() != 0)
    columns = LossColumns(
        advantages, behaviour_logprobs, weights, shaping, ref_logprobs, sequence_ids, kl_weights
    ).checked(objective, len(head), head.dtype, hidden.device)
    needs = needs_gradients(hidden, weight, bias)
    with torch.no_grad():
        logprobs, entropy, dropped, *gradients = linear_policy_loss_operator(
            *head.arguments(),
            columns.arguments(),
            objective.as_text(),
            needs,
            weight_main_grad,
            *selection,
        )
        result = finished_loss(objective, columns, targets, len(weight), logprobs, entropy)
        names = ("density", "skipped_mass", "rows_skipped")
        result.metrics.update(zip(names, dropped.unbind(), strict=True))
    if not any(needs):
        return result
    needs[1] = needs[1] and weight_main_grad is None
    gradients = [g if needed else None for g, needed in zip(gradients, needs, strict=True)]
    return result._replace(loss=WithGradients.apply(result.loss, hidden, weight, bias, *gradients))
