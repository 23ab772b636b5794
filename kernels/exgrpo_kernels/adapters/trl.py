"""TRL: its fused head replaced, and GRPO's loss with the gradient made in the forward.

    from exgrpo_kernels.adapters.trl import use_fused_head
    undo = use_fused_head()                       # every TRL trainer that scores with its fused head

    from exgrpo_kernels.adapters.trl import FusedGRPOTrainer
    FusedGRPOTrainer(model=..., reward_funcs=..., args=GRPOConfig(...)).train()

`use_fused_head` keeps TRL's loss and makes its log-probabilities and entropy with
`linear_logprob`. `FusedGRPOTrainer` also makes the gradient of the loss in the forward
(`linear_policy_loss`, three GEMMs in place of four); value and metrics stay TRL's own, computed
from the fused log-probabilities.

Legend: B sequences, C completion tokens, N rows handed to the head, D hidden, V vocabulary.
"""

# pyright: reportMissingImports=false

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import trl.trainer.utils as trl_utils
from torch import Tensor
from trl import GRPOTrainer

from exgrpo_kernels import PolicyObjective, linear_logprob, linear_policy_loss, policy_loss
from exgrpo_kernels.adapters import AdapterError, require_parameters, warn_if_untested

TESTED = "1.16.0"
# Micro-batches whose gradient is compared with autograd through TRL's own loss.
CHECKED_MICRO_BATCHES = 2
GRADIENT_TOLERANCE = 1e-4
EXPRESSIBLE = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo")
# Inputs of vision models, which go to the model as they are.
MODEL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


# ---- the head ------------------------------------------------------------------------------------


class HeadCall(NamedTuple):
    """The arguments of `ChunkedLogProbFunction.apply`, in TRL's order."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    targets: Tensor  # [N]
    temperature: float
    chunk_size: int
    softcap: float | None = None
    logit_scale: float = 1.0
    outputs: tuple[str, ...] = ()

    def operands(self, rows: Tensor | slice = slice(None)) -> dict[str, Any]:
        """The head's arguments of our losses, for some rows, in the dtype of autocast.

        `logit_scale` multiplies the logits before soft cap and temperature; on the hidden states
        it costs D instead of V products a row.
        """
        hidden, weight, bias = self.hidden[rows], self.weight, self.bias
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        if self.logit_scale != 1.0:
            hidden = hidden * self.logit_scale
            bias = None if bias is None else bias * self.logit_scale
        return {
            "hidden": hidden,
            "weight": weight,
            "bias": bias,
            "targets": self.targets[rows],
            "temperature": self.temperature,
            "softcap": self.softcap,
        }


class LogprobHead:
    """`ChunkedLogProbFunction` by `linear_logprob`; outputs that it lacks are left to TRL."""

    def __init__(self, original: type[torch.autograd.Function]) -> None:
        self.original = original

    def apply(self, *arguments) -> tuple[Tensor | None, ...]:
        """Log-probs and entropy [N], and None for what is not asked for."""
        call = HeadCall(*arguments)
        if set(call.outputs) - {"log_probs", "entropy"}:
            return self.original.apply(*arguments)
        operands = call.operands()  # reads autocast, so before it is off
        with torch.autocast(call.hidden.device.type, enabled=False):
            made = linear_logprob(**operands)
        return made.logprobs, made.entropy if "entropy" in call.outputs else None, None, None, None


def check_head() -> None:
    """AdapterError unless TRL's fused head is where this module replaces it."""
    function = getattr(trl_utils, "_ChunkedLogProbFunction", None)
    if function is None:
        raise AdapterError("trl.trainer.utils was expected to hold _ChunkedLogProbFunction")
    if isinstance(function, LogprobHead):
        return
    names = ("hidden", "weight", "bias", "targets", "temperature", "chunk_size")
    require_parameters(
        function.forward, *names, "final_logit_softcapping", "logit_scale", "outputs"
    )


def use_fused_head() -> Callable[[], None]:
    """Score with `linear_logprob` in every TRL trainer of this process that uses its fused head.

    Returns a function that restores TRL's own head. Calling it twice does nothing more.
    Errors: AdapterError where TRL's head has moved or takes other arguments.
    """
    check_head()
    warn_if_untested("trl", TESTED)
    original = trl_utils._ChunkedLogProbFunction
    if isinstance(original, LogprobHead):
        return lambda: None
    installed = LogprobHead(original)
    trl_utils._ChunkedLogProbFunction = installed  # type: ignore[assignment]

    def undo() -> None:
        if trl_utils._ChunkedLogProbFunction is installed:
            trl_utils._ChunkedLogProbFunction = original  # type: ignore[assignment]

    return undo


# ---- the loss ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """[B, C] each: what `linear_policy_loss` takes beside the head, before rows are selected."""

    advantages: Tensor
    behaviour_logprobs: Tensor
    weights: Tensor
    ref_logprobs: Tensor | None
    sequence_ids: Tensor | None
    shaping: Tensor | None

    def rows(self, mask: Tensor) -> dict[str, Any]:
        """[M] each, of the M positions of the bool mask [B, C], row by row."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: None if v is None else v[mask] for name, v in values.items()}


class LossHead:
    """Takes the place of `ChunkedLogProbFunction` for one micro-batch and makes its gradient.

    The loss has to be made where hidden states and head meet, inside the wrapped forward, so
    that FSDP and DeepSpeed have the weight together. Its gradient leaves as part of the returned
    log-probabilities: one of them depends on the loss, with derivative 1, and the others on
    nothing (`carried`).
    """

    def __init__(self, columns: Columns, objective: PolicyObjective, is_valid: Tensor) -> None:
        self.columns = columns
        self.objective = objective
        self.is_valid = is_valid  # bool [B, C]
        self.loss: Tensor | None = None  # of the last call, without gradient

    def apply(self, *arguments) -> tuple[Tensor | None, ...]:
        """Log-probs and entropy [N] of the completion rows, 0 elsewhere."""
        call = HeadCall(*arguments)
        hidden, rows = call.hidden, self.rows_of(call.hidden)
        operands = call.operands(rows)
        with torch.autocast(hidden.device.type, enabled=False):
            made = linear_policy_loss(
                **operands,
                objective=self.objective,
                sparsity="off",
                **self.columns.rows(self.is_valid),
            )
        assert made.entropy is not None
        self.loss = made.loss.detach()
        logprobs = made.logprobs.detach().clone()
        if len(logprobs):
            logprobs = torch.cat([logprobs[:1] + (made.loss - made.loss.detach()), logprobs[1:]])
        else:
            logprobs = operands["hidden"].sum(1)  # nothing, and connected to the model
        full = [t.new_zeros(len(hidden)).index_copy(0, rows, t) for t in (logprobs, made.entropy)]
        return *full, None, None, None

    def rows_of(self, hidden: Tensor) -> Tensor:
        """int64 [M]: the completion tokens among the N rows that TRL passes."""
        num_valid = int(self.is_valid.sum())
        if len(hidden) == num_valid:  # TRL has taken the valid rows already
            return torch.arange(num_valid, device=hidden.device)
        batch, length = self.is_valid.shape
        positions = torch.arange(len(hidden), device=hidden.device).view(batch, -1)
        return positions[:, -length:][self.is_valid]


@contextmanager
def installed(head: LossHead) -> Iterator[None]:
    """TRL's fused head replaced by `head` within the block."""
    previous = trl_utils._ChunkedLogProbFunction
    trl_utils._ChunkedLogProbFunction = head  # type: ignore[assignment]
    try:
        yield
    finally:
        trl_utils._ChunkedLogProbFunction = previous


def carried(logprobs: Tensor) -> Tensor:
    """A zero with the gradient that `LossHead` has put into its log-probabilities."""
    return (logprobs - logprobs.detach()).sum()


class FusedGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` whose policy loss makes its gradient in the forward.

    Takes the arguments of `GRPOTrainer`. The first micro-batches compare the gradient with
    autograd through TRL's own loss and raise `AdapterError` where they differ. Settings that one
    `PolicyObjective` cannot say train as in TRL, which is said once: see `why_not_fused`.

    One input more than TRL's: `shaping` [B], 0 for a row of the surrogate, g > 0 for one of
    w / (w + g) (ExGRPO's replayed trajectories); such a batch needs `old_per_token_logps`.
    """

    def __init__(self, *args, **kwargs) -> None:
        check_head()
        names = ("model", "input_ids", "attention_mask", "logits_to_keep", "compute_entropy")
        require_parameters(GRPOTrainer._get_per_token_logps_and_entropies, *names)
        require_parameters(GRPOTrainer._compute_loss, "model", "inputs")
        warn_if_untested("trl", TESTED)
        self._scored: tuple[Tensor, Tensor, None] | None = None
        self._micro_batches_checked = 0
        self._reasons_said: set[str] = set()
        super().__init__(*args, **kwargs)

    def why_not_fused(self, inputs: dict) -> str | None:
        """The setting that leaves this micro-batch to TRL's loss; None where the fused one runs."""
        is_on_policy = inputs.get("old_per_token_logps") is None
        corrects_kl = self.beta != 0.0 and self.args.use_bias_correction_kl
        reasons = {
            f"loss_type={self.loss_type!r}": self.loss_type not in EXPRESSIBLE,
            "off_policy_mask_threshold": self.off_policy_mask_threshold is not None,
            "top_entropy_quantile < 1": self.top_entropy_quantile < 1.0,
            "delta": self.args.delta is not None,
            "an entropy bonus": self._entropy_bonus_enabled,
            "the router's auxiliary loss": self.aux_loss_enabled,
            "cispo with epsilon_high < 1": self.loss_type == "cispo"
            and self.epsilon_high < 1.0
            and not is_on_policy,
            "use_bias_correction_kl at sequence level without old log-probs": corrects_kl
            and is_on_policy
            and self.importance_sampling_level == "sequence",
        }
        return next((name for name, applies in reasons.items() if applies), None)

    def fused_objective(self, *, is_on_policy: bool) -> PolicyObjective:
        """TRL's loss type as a `PolicyObjective`.

        Without old log-probs TRL takes the current ones: every ratio is 1, where the clipped and
        the soft surrogates have the gradient of `reinforce`, and k3 times the ratio that of k2.
        """
        corrected = ("k2" if is_on_policy else "k3_ratio") if self.beta else "k3"
        kl = {
            "kl_coef": self.beta,
            "kl_estimator": corrected if self.args.use_bias_correction_kl else "k3",
        }
        if is_on_policy:
            return PolicyObjective(surrogate="reinforce", **kl)
        ratio_level = self.importance_sampling_level
        if self.loss_type == "cispo":
            return PolicyObjective(
                surrogate="cispo",
                ratio_level=ratio_level,
                clip_high=self.epsilon_high - 1.0,
                **kl,
            )
        if self.loss_type == "sapo":
            return PolicyObjective(
                surrogate="sapo",
                ratio_level=ratio_level,
                sapo_temperature_positive=self.args.sapo_temperature_pos,
                sapo_temperature_negative=self.args.sapo_temperature_neg,
                **kl,
            )
        return PolicyObjective(
            clip_low=self.epsilon_low, clip_high=self.epsilon_high, ratio_level=ratio_level, **kl
        )

    def token_weights(self, mask: Tensor, inputs: dict) -> Tensor:
        """[B, C] -> [B, C]: mask x normaliser of `loss_type`, as TRL documents its loss types."""
        accumulation = self.current_gradient_accumulation_steps
        match self.loss_type:
            case "grpo" | "sapo":
                normaliser = mask.sum(1, keepdim=True).clamp(min=1.0) * len(mask) * accumulation
            case "bnpo":
                normaliser = mask.sum().clamp(min=1.0) * accumulation
            case "dr_grpo":
                normaliser = len(mask) * self.max_completion_length * accumulation
            case "luspo":
                normaliser = len(mask) * accumulation
            case _:  # dapo, cispo: tokens of the generation batch, as those of one accumulation
                tokens = inputs["num_items_in_batch"].clamp(min=1.0)
                share = accumulation / self.args.steps_per_generation
                normaliser = tokens / self.accelerator.num_processes * share
        return mask / normaliser

    def fused_columns(self, mask: Tensor, inputs: dict, *, is_on_policy: bool) -> Columns:
        """[B, C] columns. vLLM's correction goes into the advantages: the KL does not get it."""
        advantages = inputs["advantages"].float()
        if advantages.dim() == 1:
            advantages = advantages[:, None]
        if self.use_vllm and self.vllm_importance_sampling_correction:
            advantages = advantages * inputs["importance_sampling_ratio"]
        advantages = advantages.expand_as(mask)
        is_sequence_level = self.importance_sampling_level == "sequence"
        if is_on_policy and self.loss_type == "cispo":
            advantages = advantages * min(1.0, self.epsilon_high)
        elif is_on_policy and is_sequence_level:
            # The gradient of a sequence's ratio is shared by its tokens.
            lengths = mask.sum(1, keepdim=True).clamp(min=1.0)
            advantages = ((advantages * mask).sum(1, keepdim=True) / lengths).expand_as(mask)
        old, reference = inputs.get("old_per_token_logps"), inputs.get("ref_per_token_logps")
        ids = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)
        shaping = inputs.get("shaping")
        return Columns(
            advantages=advantages,
            # reinforce does not read them
            behaviour_logprobs=torch.zeros_like(mask) if old is None else old.float(),
            weights=self.token_weights(mask, inputs),
            ref_logprobs=None if self.beta == 0.0 or reference is None else reference.float(),
            sequence_ids=ids if is_sequence_level and not is_on_policy else None,
            shaping=None if shaping is None else shaping[:, None].expand_as(mask),
        )

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        if self._scored is not None:
            return self._scored
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _compute_loss(self, model, inputs):
        reason = self.why_not_fused(inputs)
        if reason is not None and reason not in self._reasons_said:
            self._reasons_said.add(reason)
            warnings.warn(f"FusedGRPOTrainer leaves {reason} to TRL's own loss", stacklevel=2)
        if reason is not None or not torch.is_grad_enabled():
            return super()._compute_loss(model, inputs)
        is_on_policy = inputs.get("old_per_token_logps") is None
        completion_mask = inputs["completion_mask"]
        mask = (completion_mask * inputs.get("tool_mask", 1)).float()
        objective = self.fused_objective(is_on_policy=is_on_policy)
        columns = self.fused_columns(mask, inputs, is_on_policy=is_on_policy)
        is_valid = completion_mask.bool()
        head = LossHead(columns, objective, is_valid)
        with installed(head):
            logprobs, entropy, _ = super()._get_per_token_logps_and_entropies(
                model,
                torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
                torch.cat([inputs["prompt_mask"], completion_mask], dim=1),
                inputs["completion_ids"].size(1),
                compute_entropy=True,
                **{name: inputs[name] for name in MODEL_INPUTS if name in inputs},
            )
        value = self._trl_value(model, inputs, logprobs, entropy, objective, columns, is_valid)
        if columns.shaping is not None and head.loss is not None:
            value = head.loss  # TRL has no shaped rows
        return value + carried(logprobs)

    def _trl_value(
        self,
        model,
        inputs: dict,
        logprobs: Tensor,
        entropy: Tensor,
        objective: PolicyObjective,
        columns: Columns,
        is_valid: Tensor,
    ) -> Tensor:
        """TRL's loss, without gradient, and its metrics, of log-probs [B, C] made elsewhere."""
        checks = self._micro_batches_checked < CHECKED_MICRO_BATCHES
        leaf = logprobs.detach().requires_grad_(checks)
        self._scored = (leaf, entropy.detach(), None)
        try:
            value = super()._compute_loss(model, inputs)
        finally:
            self._scored = None
        if checks:
            self._micro_batches_checked += 1
            (expected,) = torch.autograd.grad(value, leaf)
            ours = leaf.detach()[is_valid].requires_grad_()
            loss = policy_loss(ours, objective=objective, **columns.rows(is_valid)).loss
            (gradient,) = torch.autograd.grad(loss, ours)
            expected = expected[is_valid]
            if columns.shaping is not None:  # TRL has no shaped rows
                is_plain = columns.shaping[is_valid] == 0
                gradient, expected = gradient[is_plain], expected[is_plain]
            error = (gradient - expected).norm() / expected.norm().clamp(min=1e-20)
            if error > GRADIENT_TOLERANCE and expected.norm() > 1e-12:
                raise AdapterError(
                    f"the fused gradient of loss_type={self.loss_type!r} differs by {error:.1e} "
                    f"from TRL's own; this adapter is tested with trl {TESTED}"
                )
        return value.detach()
