"""Fused linear policy losses that never hold the full logits.

    linear_logprob      hidden x weight -> log-probabilities, entropy, lse; any loss can follow
    linear_policy_loss  hidden x weight -> the policy loss, gradients made in the forward
    policy_loss         the same objective on vectors of log-probabilities
    policy_loss_from_logits   the same objective where logits exist, overwritten by gradients
    vocab_parallel_linear_logprob, vocab_parallel_policy_loss   the first two, of a sharded head
    linear_distillation_loss  KL to a teacher over the whole vocabulary, from both hidden states
    PolicyObjective     the ratio, clip, surrogate, KL and entropy terms of that loss

`*_reference` functions in plain PyTorch are the specifications.
"""

from exgrpo_kernels.distillation_loss import (
    DistillationLoss,
    linear_distillation_loss,
    linear_distillation_loss_reference,
)
from exgrpo_kernels.linear_head import LinearLogprob, NonFiniteHidden
from exgrpo_kernels.linear_logprob import linear_logprob, linear_logprob_reference
from exgrpo_kernels.objective import PolicyObjective
from exgrpo_kernels.policy_loss import (
    PolicyLoss,
    linear_policy_loss,
    linear_policy_loss_reference,
    policy_loss,
)
from exgrpo_kernels.policy_loss_from_logits import policy_loss_from_logits
from exgrpo_kernels.vocab_parallel import vocab_parallel_linear_logprob, vocab_parallel_policy_loss

__all__ = [
    "DistillationLoss",
    "LinearLogprob",
    "NonFiniteHidden",
    "PolicyLoss",
    "PolicyObjective",
    "linear_distillation_loss",
    "linear_distillation_loss_reference",
    "linear_logprob",
    "linear_logprob_reference",
    "linear_policy_loss",
    "linear_policy_loss_reference",
    "policy_loss",
    "policy_loss_from_logits",
    "vocab_parallel_linear_logprob",
    "vocab_parallel_policy_loss",
]
