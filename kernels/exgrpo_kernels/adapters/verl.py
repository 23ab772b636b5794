"""verl: its torch head replaced, and the objectives of this package as policy losses.

    actor_rollout_ref.actor.policy_loss.loss_mode=exgrpo          (the clip settings of verl)
    actor_rollout_ref.actor.policy_loss.loss_mode=exgrpo_cispo    (or exgrpo_sapo, exgrpo_gspo)
    EXGRPO_VERL_HEAD=1                                            (the head, in every worker)

The entry point `verl.plugins` loads `activate` in every Ray worker; verl hides the errors of a
plugin, so `activate` logs one line that says what is active, and `is_active()` answers.

Legend: B sequences, L response tokens, N rows handed to the head, D hidden, V vocabulary.
"""

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from exgrpo_kernels import PolicyObjective, linear_logprob, policy_loss
from exgrpo_kernels.adapters import require_parameters, warn_if_untested

TESTED = "0.9.1"
HEAD_SWITCH = "EXGRPO_VERL_HEAD"
# What verl's clip settings, read when the loss is called, do not say.
OBJECTIVES = {
    "exgrpo": PolicyObjective(),
    "exgrpo_cispo": PolicyObjective(surrogate="cispo"),
    "exgrpo_sapo": PolicyObjective(surrogate="sapo"),
    "exgrpo_gspo": PolicyObjective(ratio_level="sequence"),
}
log = logging.getLogger(__name__)


# ---- the loss ------------------------------------------------------------------------------------


def verl_objective(objective: PolicyObjective, config: Any) -> PolicyObjective:
    """`objective` with the clip bounds of verl's actor config."""
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    # verl's dual clip belongs to its token-level clipped loss alone
    is_ppo = objective.surrogate == "clip" and objective.ratio_level == "token"
    dual = config.get("clip_ratio_c", 3.0) if is_ppo else None
    return replace(objective, clip_low=low, clip_high=high, dual_clip=dual)


def aggregation_weights(response_mask: Tensor, loss_agg_mode: str, config: Any) -> Tensor:
    """[B, L] -> [B, L]: the weight of each token in verl's `agg_loss`, which is linear."""
    from verl.trainer.ppo.core_algos import agg_loss  # pyright: ignore[reportMissingImports]

    losses = torch.zeros_like(response_mask, dtype=torch.float32, requires_grad=True)
    with torch.enable_grad():
        total = agg_loss(losses, response_mask, loss_agg_mode, **config.global_batch_info)
    return torch.autograd.grad(total, losses)[0]


def verl_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
    *,
    objective: PolicyObjective,
) -> tuple[Tensor, dict[str, float]]:
    """[B, L] each -> scalar loss and metrics, in the signature of verl's registry."""
    weights = aggregation_weights(response_mask, loss_agg_mode, config)
    if rollout_is_weights is not None:
        weights = weights * rollout_is_weights
    ids = torch.arange(len(log_prob), device=log_prob.device)[:, None].expand_as(log_prob)
    made = policy_loss(
        log_prob.flatten(),
        advantages=advantages.float().flatten(),
        behaviour_logprobs=old_log_prob.float().flatten(),
        weights=weights.flatten(),
        sequence_ids=ids.flatten(),
        objective=verl_objective(objective, config),
    )
    return made.loss, {f"actor/exgrpo_{name}": float(v) for name, v in made.metrics.items()}


def register_losses() -> None:
    """Put `OBJECTIVES` into verl's registry of policy losses."""
    from verl.trainer.ppo import core_algos  # pyright: ignore[reportMissingImports]

    for name, objective in OBJECTIVES.items():
        loss = functools.partial(verl_policy_loss, objective=objective)
        core_algos.register_policy_loss(name)(loss)


# ---- the head ------------------------------------------------------------------------------------


def fused_forward(
    self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """[..., D], [V, D], [...] -> log-probabilities float32 and entropy [...]; verl's signature."""
    made = linear_logprob(
        hidden_states.reshape(-1, hidden_states.shape[-1]),
        vocab_weights,
        input_ids.reshape(-1).long(),
        temperature=temperature,
    )
    shape = input_ids.shape
    return made.logprobs.view(shape), made.entropy.view(shape).to(hidden_states.dtype)


def use_fused_head() -> Callable[[], None]:
    """Score with `linear_logprob` where verl uses its torch or Liger head; returns the undo.

    For `use_fused_kernels: true` with `impl_backend: torch` (or liger).
    Errors: AdapterError where the head takes other arguments.
    """
    from verl.utils.experimental.torch_functional import (  # pyright: ignore[reportMissingImports]
        FusedLinearForPPO,
    )

    original = FusedLinearForPPO.forward
    if original is fused_forward:
        return lambda: None
    require_parameters(original, "hidden_states", "vocab_weights", "input_ids", "temperature")
    warn_if_untested("verl", TESTED)
    FusedLinearForPPO.forward = fused_forward

    def undo() -> None:
        FusedLinearForPPO.forward = original

    return undo


# ---- the plugin ----------------------------------------------------------------------------------


def is_active() -> dict[str, bool]:
    """Which parts verl uses in this process: the registered losses, the head."""
    from verl.trainer.ppo import core_algos  # pyright: ignore[reportMissingImports]
    from verl.utils.experimental.torch_functional import (  # pyright: ignore[reportMissingImports]
        FusedLinearForPPO,
    )

    registered = set(OBJECTIVES) <= set(core_algos.POLICY_LOSS_REGISTRY)
    return {"losses": registered, "head": FusedLinearForPPO.forward is fused_forward}


def activate() -> None:
    """Register the losses, take over the head where EXGRPO_VERL_HEAD=1, and say so in the log."""
    try:
        register_losses()
        if os.environ.get(HEAD_SWITCH) == "1":
            use_fused_head()
    except Exception:
        # verl logs what a plugin raises at debug level, where nobody reads it
        log.exception("exgrpo_kernels is not active in verl")
        raise
    head = "fused head and " if is_active()["head"] else ""
    log.warning("exgrpo_kernels is active in verl: %slosses %s", head, ", ".join(OBJECTIVES))
