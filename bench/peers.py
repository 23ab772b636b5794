"""Who computes a policy loss from hidden states, each by the call its users make.

A provider takes a batch and an entropy coefficient and returns the loss, the log-probabilities and
the entropies (None where it has none); the caller runs backward. All of them do PPO clip of every
token, except those that know nothing but cross-entropy: they say so in their name.
`available` says why a provider cannot run here; nobody is left out silently.
Signatures were read in the installed sources: liger-kernel 0.8.5, trl 1.16.0, verl 0.9.1,
cut-cross-entropy 25.1.1, quack-kernels 0.6.5.
"""

# pyright: reportMissingImports=false

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from inputs import CHUNK, Batch
from torch import Tensor

from exgrpo_kernels import (
    PolicyObjective,
    linear_logprob,
    linear_policy_loss,
    policy_loss,
    policy_loss_from_logits,
)

CLIP_LOW, CLIP_HIGH = 0.2, 0.28

Outcome = tuple[Tensor, Tensor | None, Tensor | None]


def clip_loss(
    logprobs: Tensor, entropy: Tensor | None, batch: Batch, entropy_coef: float
) -> Tensor:
    """The objective as a trainer writes it on vectors."""
    ratio = (logprobs - batch.behaviour_logprobs).exp()
    clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    losses = -torch.min(ratio * batch.advantages, clipped * batch.advantages)
    if entropy_coef:
        assert entropy is not None
        losses = losses - entropy_coef * entropy
    return (batch.weights * losses).sum()


def objective(entropy_coef: float) -> PolicyObjective:
    return PolicyObjective(clip_low=CLIP_LOW, clip_high=CLIP_HIGH, entropy_coef=entropy_coef)


def columns(batch: Batch) -> dict[str, Any]:
    return {
        "advantages": batch.advantages,
        "behaviour_logprobs": batch.behaviour_logprobs,
        "weights": batch.weights,
    }


# ---- plain PyTorch -------------------------------------------------------------------------------


def statistics_of(hidden: Tensor, batch: Batch, entropy_coef: float) -> tuple[Tensor, Tensor]:
    """Full logits; the entropy joins the graph only if its gradient is wanted."""
    logits = hidden @ batch.weight.t()
    log_p = torch.log_softmax(logits.to(batch.advantages.dtype), -1)
    del logits
    logprobs = log_p.gather(1, batch.targets[:, None]).squeeze(1)
    with torch.set_grad_enabled(entropy_coef != 0):
        entropy = -(log_p.exp() * log_p).sum(-1)
    return logprobs, entropy


def naive(batch: Batch, entropy_coef: float) -> Outcome:
    logprobs, entropy = statistics_of(batch.hidden, batch, entropy_coef)
    return clip_loss(logprobs, entropy, batch, entropy_coef), logprobs, entropy


@functools.cache
def compiled_naive() -> Callable[[Batch, float], Outcome]:
    return torch.compile(naive, dynamic=False)


def plain_chunked(batch: Batch, entropy_coef: float) -> Outcome:
    """What one writes in half an hour: `naive` on slices, backward at once, autograd adds up."""
    hidden = batch.hidden.detach()
    gradient, outputs = torch.empty_like(hidden), []
    for start in range(0, len(hidden), CHUNK):
        rows = slice(start, start + CHUNK)
        part = hidden[rows].requires_grad_()
        taken = Batch(part, batch.weight, *(column[rows] for column in batch[2:]))
        loss, *statistics = naive(taken, entropy_coef)
        loss.backward()
        assert part.grad is not None
        outputs.append([loss.detach()[None], *(s.detach() for s in statistics if s is not None)])
        gradient[rows] = part.grad
    batch.hidden.grad = gradient
    loss, logprobs, entropy = (torch.cat(values) for values in zip(*outputs, strict=True))
    return loss.sum(), logprobs, entropy


def three_gemms(batch: Batch, entropy_coef: float) -> Outcome:
    """No loss at all: the three products that every loss with both gradients has to make."""
    hidden, weight = batch.hidden.detach(), batch.weight.detach()
    logits = hidden @ weight.t()
    batch.hidden.grad, batch.weight.grad = logits @ weight, logits.t() @ hidden
    return hidden.new_zeros(()), None, None


# ---- ours ----------------------------------------------------------------------------------------


def fused(
    batch: Batch, entropy_coef: float, *, sparsity: str | float = "auto", **settings: Any
) -> Outcome:
    result = linear_policy_loss(
        batch.hidden,
        batch.weight,
        batch.targets,
        objective=objective(entropy_coef),
        sparsity=sparsity,
        **columns(batch),
        **settings,
    )
    return result.loss, result.logprobs, result.entropy


def composed(batch: Batch, entropy_coef: float) -> Outcome:
    out = linear_logprob(batch.hidden, batch.weight, batch.targets)
    entropy = out.entropy if entropy_coef else out.entropy.detach()
    result = policy_loss(out.logprobs, entropy, objective=objective(entropy_coef), **columns(batch))
    return result.loss, out.logprobs, out.entropy


def from_logits(batch: Batch, entropy_coef: float) -> Outcome:
    result = policy_loss_from_logits(
        batch.hidden @ batch.weight.t(),
        batch.targets,
        objective=objective(entropy_coef),
        **columns(batch),
    )
    return result.loss, result.logprobs, result.entropy


# ---- peers ---------------------------------------------------------------------------------------


def liger_chunked_grpo(batch: Batch, entropy_coef: float) -> Outcome:
    """One sequence of N tokens; its loss gives no log-probabilities back."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss_of = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=batch.hidden.is_cuda,
        use_ref_model=False,
        epsilon_low=CLIP_LOW,
        epsilon_high=CLIP_HIGH,
        loss_type="dapo",
    )
    # it takes one advantage a sequence: sequences of one chunk length with their own
    length = min(CHUNK, len(batch.targets))
    shape = len(batch.targets) // length, length
    loss, _ = loss_of(
        batch.hidden.view(*shape, -1),
        batch.weight,
        batch.targets.view(shape),
        torch.ones(shape, device=batch.hidden.device),
        batch.advantages.view(shape)[:, 0],
        old_per_token_logps=batch.behaviour_logprobs.view(shape),
    )
    return loss, None, None


def liger_triton_grpo(batch: Batch, entropy_coef: float) -> Outcome:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    length = min(CHUNK, len(batch.targets))
    shape = len(batch.targets) // length, length
    logits = (batch.hidden @ batch.weight.t()).view(*shape, -1)
    # it expects one position more than tokens
    logits = torch.nn.functional.pad(logits, (0, 0, 0, 1))
    loss, _ = triton_grpo_loss(
        logits,
        batch.behaviour_logprobs.view(shape),
        None,
        batch.targets.view(shape),
        batch.advantages.view(shape)[:, 0],
        None,
        temperature=1.0,
        beta=0.0,
        eps_low=CLIP_LOW,
        eps_high=CLIP_HIGH,
        inplace=True,
        reduce=True,
    )
    return loss, None, None


def liger_scaled_ce(batch: Batch, entropy_coef: float) -> Outcome:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
        batch.hidden, batch.weight, batch.targets, 1.0, -100, 1, True
    )
    return clip_loss(-nll, entropy, batch, entropy_coef), -nll, entropy


def trl_chunked(batch: Batch, entropy_coef: float) -> Outcome:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    logprobs, entropy, *_ = ChunkedLogProbFunction.apply(
        batch.hidden, batch.weight, None, batch.targets, 1.0, 8192, None, 1.0, ("entropy",)
    )
    return clip_loss(logprobs, entropy, batch, entropy_coef), logprobs, entropy


def verl_torch(batch: Batch, entropy_coef: float) -> Outcome:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    logprobs, entropy = FusedLinearForPPO(512)(batch.hidden, batch.weight, batch.targets, 1.0)
    return clip_loss(logprobs, entropy, batch, entropy_coef), logprobs, entropy


def verl_triton(batch: Batch, entropy_coef: float) -> Outcome:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    logprobs, entropy = linear_cross_entropy(batch.hidden, batch.weight, batch.targets, 1.0, "none")
    return clip_loss(logprobs, entropy, batch, entropy_coef), logprobs, entropy


def cut_cross_entropy(batch: Batch, entropy_coef: float) -> Outcome:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if batch.hidden.is_cuda else "torch_compile"
    nll = linear_cross_entropy(
        batch.hidden, batch.weight, batch.targets, reduction="none", impl=impl
    )
    return clip_loss(-nll, None, batch, 0.0), -nll, None


def quack_ce(batch: Batch, entropy_coef: float) -> Outcome:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    loss = chunked_linear_cross_entropy(
        batch.hidden, batch.weight, batch.targets, chunk_size=4096, reduction="sum", tuned=True
    )
    return loss, None, None


# ---- the list ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Provider:
    """`needs` packages; `cuda` only there; `entropy`: a gradient through the entropy."""

    run: Callable[[Batch, float], Outcome]
    needs: tuple[str, ...] = ()
    cuda: bool = False
    entropy: bool = True

    def unavailable(self, batch_is_cuda: bool, entropy_coef: float) -> str | None:
        """Why this provider cannot run; None when it can."""
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if missing:
            return f"not installed: {', '.join(missing)}"
        if self.cuda and not batch_is_cuda:
            return "CUDA only"
        if entropy_coef and not self.entropy:
            return "no gradient through the entropy"
        return None


PROVIDERS = {
    "naive": Provider(naive),
    "three GEMMs, no loss": Provider(three_gemms, entropy=False),
    "linear_policy_loss": Provider(fused),
    "linear_policy_loss, bf16 logits": Provider(
        functools.partial(fused, logits_dtype=torch.bfloat16), cuda=True
    ),
    "linear_policy_loss, dense": Provider(functools.partial(fused, sparsity="off")),
    "linear_policy_loss, sparsity 1e-4": Provider(functools.partial(fused, sparsity=1e-4)),
    "linear_policy_loss, sparsity 1e-3": Provider(functools.partial(fused, sparsity=1e-3)),
    "linear_logprob + policy_loss": Provider(composed),
    "policy_loss_from_logits": Provider(from_logits),
    "plain chunked": Provider(plain_chunked),
    "torch.compile naive": Provider(lambda batch, coef: compiled_naive()(batch, coef)),
    "TRL chunked log-prob": Provider(trl_chunked, ("trl",)),
    "Liger chunked GRPO": Provider(liger_chunked_grpo, ("liger_kernel",), entropy=False),
    "Liger Triton GRPO": Provider(liger_triton_grpo, ("liger_kernel",), cuda=True, entropy=False),
    "Liger scaled CE": Provider(liger_scaled_ce, ("liger_kernel",), cuda=True),
    "verl torch": Provider(verl_torch, ("verl", "ray", "tensordict")),
    "verl Triton": Provider(verl_triton, ("verl", "ray", "tensordict"), cuda=True),
    "CCE": Provider(cut_cross_entropy, ("cut_cross_entropy",), cuda=True, entropy=False),
    "QuACK (cross-entropy only)": Provider(
        quack_ce, ("quack", "cutlass"), cuda=True, entropy=False
    ),
}
