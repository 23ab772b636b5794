"""The exact law of emitted tokens, from the full distributions of policy and prior.

One forward of both over the completions; the logits of a few hundred rows at a time exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from exgrpo_fast.experience.prior.triggers import Trigger
from exgrpo_fast.model.packing import Pack, Ragged, pack
from exgrpo_fast.model.policy import Policy, inference

ROWS_AT_ONCE = 256  # 256 x 150k float32 logits are 0.15 GB, and five such tensors exist


class MixtureLogprobs(NamedTuple):
    """Of the tokens of some completions, joined end to end; float32, on the CPU."""

    mu: Ragged  # log mu, of the emitted token
    rates: Ragged  # R: how likely a draft is thrown away there


@torch.no_grad()
def mixture_logprobs(
    policy: Policy,
    prior: Policy,
    trigger: Trigger,
    prompts: Ragged,
    completions: Ragged,
    *,
    num_tokens: int,
) -> MixtureLogprobs:
    """`num_tokens`: ids that the prior has; what lies beyond them has probability 0 there."""
    found = torch.zeros(2, len(completions.values))
    with inference(policy.model), inference(prior.model), policy.passes(), prior.passes():
        limit = policy.max_tokens_per_microbatch
        packs = pack(prompts, completions, max_tokens=limit, device=policy.device)
        for packed, counts in policy.assign_packs(packs):
            of_pack = _of_pack(policy, prior, trigger, packed, num_tokens).cpu()
            if counts:
                found[:, packed.places_in(completions)] = of_pack
    policy.processes.all_reduce_sum_(found)  # each is 0 on all ranks but one
    mu, rates = (Ragged(values, completions.lengths) for values in found)
    return MixtureLogprobs(mu, rates)


def _of_pack(
    policy: Policy, prior: Policy, trigger: Trigger, packed: Pack, num_tokens: int
) -> Tensor:
    """float32 [2, N]: log mu and R."""
    hidden_p, hidden_r = policy.hidden_states(packed), hidden_states(prior, packed)
    found = []
    for rows in torch.arange(len(packed.targets), device=hidden_p.device).split(ROWS_AT_ONCE):
        logp = logprobs(policy, hidden_p[rows])
        logr = logprobs(prior, hidden_r[rows], num_tokens=num_tokens, width=logp.shape[1])
        law = trigger.law(logp, logr)
        targets = packed.targets[rows, None]
        emitted = law.kept_NV.gather(1, targets) + law.redrawn_NV.gather(1, targets)
        found.append(torch.stack([emitted[:, 0].log(), law.rate_N]))
    return torch.cat(found, dim=1)


def hidden_states(prior: Policy, packed: Pack) -> Tensor:
    """[N, D], of sequences that the policy has written."""
    return prior.hidden_states(replace(packed, input_ids=known_ids(prior, packed.input_ids)))


def known_ids(policy: Policy, ids: Tensor) -> Tensor:
    """The policy may have more rows of padding than the prior and, at times, draw one. No such
    token is ever kept, but a draft that holds one is read."""
    embeddings: Any = policy.model.get_input_embeddings()
    return ids.clamp(max=embeddings.weight.shape[0] - 1)


def logprobs(
    policy: Policy, hidden_ND: Tensor, *, num_tokens: int | None = None, width: int | None = None
) -> Tensor:
    """float32 [N, width]: of the first `num_tokens` ids, the others -inf."""
    weight, bias, softcap = policy.head_for(hidden_ND)
    logits = F.linear(hidden_ND, weight, None if bias is None else bias.to(hidden_ND.dtype)).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return pad_logprobs(logits, num_tokens or logits.shape[-1], width or logits.shape[-1])


def pad_logprobs(logits: Tensor, num_tokens: int, width: int) -> Tensor:
    """[..., rows of the head] -> float32 [..., width]; ids from `num_tokens` on have -inf."""
    known = logits[..., :num_tokens].float().log_softmax(dim=-1)
    return F.pad(known, (0, width - num_tokens), value=-torch.inf)


@torch.no_grad()
def completion_logprobs(
    prior: Policy,
    prompts: Ragged,
    completions: Ragged,
    *,
    num_tokens: int,
    on_read: Callable[[Pack, Tensor], None] = lambda packed, hidden_ND: None,
) -> list[Tensor]:
    """float32 [T] of each completion, on the CPU; -inf for ids that the prior does not have.

    `on_read` is called with the hidden states [N, D] of each pack that this rank reads.
    """
    found = torch.zeros(len(completions.values))
    with inference(prior.model), prior.passes():
        limit = prior.max_tokens_per_microbatch
        packs = pack(prompts, completions, max_tokens=limit, device=prior.device)
        for packed, counts in prior.assign_packs(packs):
            hidden_ND, values = hidden_states(prior, packed), []
            if not counts:
                continue
            on_read(packed, hidden_ND)
            for rows in torch.arange(len(hidden_ND), device=prior.device).split(ROWS_AT_ONCE):
                targets = packed.targets[rows, None]
                width = int(targets.max()) + 1
                logr = logprobs(
                    prior, hidden_ND[rows], num_tokens=num_tokens, width=max(width, num_tokens)
                )
                values.append(logr.gather(1, targets)[:, 0])
            found[packed.places_in(completions)] = torch.cat(values).cpu()
    prior.processes.all_reduce_sum_(found)
    return list(Ragged(found, completions.lengths).split())
