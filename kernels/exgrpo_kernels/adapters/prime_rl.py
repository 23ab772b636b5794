"""prime-rl: every objective of this package as its custom loss, and its chunked head replaced.

    [trainer.loss]
    type = "custom"
    import_path = "exgrpo_kernels.adapters.prime_rl.policy_loss"
    kwargs = { surrogate = "cispo", clip_high = 4.0 }

`use_fused_head()` makes its log-probabilities with `linear_logprob`, whose entropy has a gradient
(prime-rl's own head refuses one). Written for the interfaces of August 2026 (commit 559b447);
the package is not on the index, so its classes are taken as they come, by their field names.

Legend: L tokens of one sequence, N rows handed to the head, D hidden, V vocabulary.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from exgrpo_kernels import PolicyObjective, linear_logprob
from exgrpo_kernels import policy_loss as vector_policy_loss
from exgrpo_kernels.adapters import AdapterError, require_parameters

HEAD_MODULE = "prime_rl.trainer.models.layers.lm_head"
LOSS_MODULE = "prime_rl.trainer.rl.loss"
INPUTS = ("trainer_logprobs", "inference_logprobs", "advantages", "loss_mask")


def objective_from(settings: Mapping[str, object]) -> PolicyObjective:
    """Keyword settings of a config file -> `PolicyObjective`; ValueError names an unknown one."""
    known = {f.name for f in fields(PolicyObjective)}
    if unknown := sorted(set(settings) - known):
        raise ValueError(
            f"PolicyObjective has no {', '.join(unknown)}; it takes {', '.join(sorted(known))}"
        )
    return PolicyObjective(**settings)  # type: ignore[arg-type]


def policy_loss(inputs: Any, **settings: Any) -> Any:
    """`LossInputs` of one sequence ([L] each) -> `LossOutputs`, the sum over its trained tokens.

    settings: the fields of `PolicyObjective`. kl_coef > 0 reads `ref_logprobs`, or the
    `teacher_logprobs` of earlier versions.
    Errors: AdapterError where `LossInputs` lacks a field, ValueError for an unknown setting.
    """
    if missing := [name for name in INPUTS if not hasattr(inputs, name)]:
        raise AdapterError(f"LossInputs was expected to have {', '.join(missing)}")
    objective = objective_from(settings)
    reference = getattr(inputs, "ref_logprobs", None)
    if reference is None:
        reference = getattr(inputs, "teacher_logprobs", None)
    weights = inputs.loss_mask.float()
    if getattr(inputs, "loss_weights", None) is not None:
        weights = weights * inputs.loss_weights
    made = vector_policy_loss(
        inputs.trainer_logprobs,
        advantages=inputs.advantages.float(),
        behaviour_logprobs=inputs.inference_logprobs.float(),
        weights=weights,
        ref_logprobs=None if objective.kl_coef == 0 or reference is None else reference.float(),
        sequence_ids=torch.zeros_like(inputs.loss_mask, dtype=torch.long),
        objective=objective,
    )
    outputs = importlib.import_module(LOSS_MODULE).LossOutputs
    return outputs(loss=made.loss, metrics={f"exgrpo/{k}": v for k, v in made.metrics.items()})


class LogprobHead:
    """`_SequenceChunkedLogProbEntropyFn` by `linear_logprob`."""

    @staticmethod
    def apply(
        hidden: Tensor, weight: Tensor, labels: Tensor, inv_temperature: Tensor, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        """[N, D], [V, D], [N], [N] -> log-probabilities and entropy [N], float32."""
        made = linear_logprob(
            hidden, weight, labels, temperature=inv_temperature.float().reciprocal()
        )
        return made.logprobs, made.entropy


def use_fused_head() -> Callable[[], None]:
    """Score with `linear_logprob` in this process's prime-rl trainer; returns the undo.

    Errors: AdapterError where the head is gone or takes other arguments.
    """
    module = importlib.import_module(HEAD_MODULE)
    original = getattr(module, "_SequenceChunkedLogProbEntropyFn", None)
    if original is None:
        raise AdapterError(f"{HEAD_MODULE} was expected to hold _SequenceChunkedLogProbEntropyFn")
    if original is LogprobHead:
        return lambda: None
    require_parameters(
        original.forward, "hidden", "weight", "labels", "inv_temperature", "chunk_size"
    )
    module._SequenceChunkedLogProbEntropyFn = LogprobHead  # type: ignore[attr-defined]

    def undo() -> None:
        module._SequenceChunkedLogProbEntropyFn = original  # type: ignore[attr-defined]

    return undo
