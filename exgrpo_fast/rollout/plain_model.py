"""The plain model, exactly as transformers loads it, on a few short sequences, and hooks into it.

Legend: B sequences of one shape, T tokens of a completion, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.core.heartbeat import HEARTBEAT
from exgrpo_fast.core.types import Completion
from exgrpo_fast.model.attention.interface import compared_windows
from exgrpo_fast.model.packing import Ragged
from exgrpo_fast.model.policy import Policy, inference
from exgrpo_fast.model.tiling import decoder_layers

BLOCK = 128  # the longest block of a kernel or a buffer that a sequence is cut into
COMPLETION_TOKENS = 3
LOGITS = 10.0  # deviation of a trained model's logits


class Probe(NamedTuple):
    """Sequences whose log-probs are compared."""

    prompts: list[tuple[int, ...]]  # of each sequence; two of them are the same
    completions: list[Tensor]  # int64 [T]

    def ragged(self) -> tuple[Ragged, Ragged]:
        return Ragged.of(self.prompts), Ragged.of(self.completions)

    def pick(self, which: slice) -> Probe:
        return Probe(self.prompts[which], self.completions[which])

    def of_one_shape(self) -> list[list[int]]:
        """Sequences whose prompts and completions have the same lengths."""
        groups: dict[tuple[int, int], list[int]] = {}
        for i, (prompt, completion) in enumerate(zip(*self, strict=True)):
            groups.setdefault((len(prompt), len(completion)), []).append(i)
        return list(groups.values())


class PlainPass(NamedTuple):
    """What the plain model gives for a probe."""

    logprobs: list[Tensor]  # float32 [T] of each sequence
    logit_size: float  # median |logit|, over the temperature


def probe_prompts(prompt_ids: Sequence[int], longest: int | None = None) -> list[tuple[int, ...]]:
    """Four prompts: one twice, a shorter one (padded at the left), and one longer than a block."""
    ids = list(prompt_ids)
    room = BLOCK + 1
    if longest is not None:
        room = max(1, min(room, longest - COMPLETION_TOKENS))
    usual, short = ids[: min(12, room)], ids[-min(5, room) :]
    repeated = (ids * (room // len(ids) + 1))[:room]
    return [tuple(usual), tuple(usual), tuple(short), tuple(repeated)]


def made_up(vocabulary: int, seed: int) -> Completion:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (COMPLETION_TOKENS,), generator=generator)
    return Completion(ids, torch.zeros(COMPLETION_TOKENS), truncated=True)


@torch.no_grad()
def plain_pass(policy: Policy, probe: Probe) -> PlainPass:
    """From the model's own logits. Only sequences whose prompts and completions are equally long share
    a pass: there is no padding and no mask."""
    found: dict[int, Tensor] = {}
    sizes: list[Tensor] = []
    with inference(policy.model), policy.autocast(), policy.passes():
        for members in probe.of_one_shape():
            HEARTBEAT.beat()
            completions_BT = torch.stack([probe.completions[i] for i in members])
            prompts = torch.tensor([probe.prompts[i] for i in members])
            ids = torch.cat([prompts, completions_BT], 1).to(policy.device)
            logits_BTV = _logits(policy, ids, completions_BT.shape[1] + 1)[:, :-1]
            scaled_BTV = logits_BTV.float() / policy.temperature
            sizes.append(scaled_BTV.abs().median().cpu())
            picked_BT1 = scaled_BTV.log_softmax(-1).gather(
                2, completions_BT.to(policy.device)[..., None]
            )
            found |= zip(members, picked_BT1[..., 0].cpu(), strict=True)
    logprobs = [found[i] for i in range(len(probe.prompts))]
    return PlainPass(logprobs, float(torch.stack(sizes).max()))


class HeadPass(NamedTuple):
    """Log-probs [B, V] in float32 for made-up states, and the window of each layer."""

    of_model: Tensor
    of_policy: Tensor  # by what it hands to the losses
    windows: dict[int, int | None]  # None: all tokens are seen


@torch.no_grad()
def head_pass(policy: Policy) -> HeadPass:
    """With logits of a deviation of `LOGITS`, so that a cap, a scale or a mask of them shows, be they
    small at the start. UserError where the model does not call its body, or states do not fit the
    head; UnsupportedAttention where a mask has another window than its layer.
    """
    made: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)
    with inference(policy.model), policy.autocast(), policy.passes():

        def replace(module: Any, inputs: Any, out: Any) -> Any:
            states = out[0]
            width = policy.head.weight.shape[1]
            if states.shape[-1] != width:
                raise UserError(
                    f"its head takes states of {width} numbers, and its body gives {states.shape[-1]}"
                )
            random = torch.randn(states.shape[-2:], generator=generator).to(states)
            some = policy.head_for(random).weight[:1024]
            logits = torch.nn.functional.linear(random.to(some.dtype), some) * policy.logit_scale
            made.append(random * (LOGITS / logits.float().std()).to(states))
            out = copy.copy(out)
            out[next(iter(out))] = made[-1].expand_as(states)
            return out

        with ExitStack() as stack:
            for body in {policy.model.base_model, policy.model.get_decoder()}:
                stack.enter_context(hooked(body, replace))
            windows = stack.enter_context(compared_windows())
            ids = torch.tensor([[0, 1]], device=policy.device)
            mask = torch.ones_like(ids)
            found = _logits(policy, ids, 2, attention_mask=mask)[0]
        if not made:
            raise UserError("the model does not call its body as a whole")
        hidden_BD = made[-1].to(policy.compute_dtype) * policy.logit_scale
        weight, bias, softcap = policy.head_for(hidden_BD)
        own = torch.nn.functional.linear(hidden_BD, weight)
    own = own.float() if bias is None else own.float() + bias.float()
    own = own if softcap is None else softcap * (own / softcap).tanh()
    logprobs = (found.float().log_softmax(-1).cpu(), own.log_softmax(-1).cpu())
    return HeadPass(*logprobs, windows.layers)


def _logits(policy: Policy, ids: Tensor, count: int, **inputs: Tensor) -> Tensor:
    """[B, count, V]: behind the last tokens."""
    model: Any = policy.model
    accepted = inspect.signature(model.forward).parameters
    last = {"logits_to_keep": count} if "logits_to_keep" in accepted else {}
    with _whole_head(policy):
        return model(input_ids=ids, use_cache=False, **last, **inputs).logits[:, -count:]


@contextmanager
def _whole_head(policy: Policy) -> Iterator[None]:
    """A sharded head is part of no forward pass: inside, one with the weight that `passes` gathered."""
    if policy.processes.count == 1:
        yield
        return
    model: Any = policy.model
    sharded = model.get_output_embeddings()
    weight = policy.head_for(torch.empty(0, dtype=policy.compute_dtype)).weight.detach()
    whole = torch.nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    whole.weight = torch.nn.Parameter(weight, requires_grad=False)
    model.set_output_embeddings(whole)
    try:
        yield
    finally:
        model.set_output_embeddings(sharded)


@contextmanager
def rounded_embeddings(policy: Policy) -> Iterator[None]:
    """Inside, the embeddings are off by half a unit in the last place of the compute dtype."""
    half = torch.finfo(policy.compute_dtype).eps / 2
    generator = torch.Generator().manual_seed(0)

    def move(module: Any, inputs: Any, out: Tensor) -> Tensor:
        signs = torch.randint(2, out.shape, generator=generator).to(out.device, out.dtype) * 2 - 1
        return out * (1 + half * signs)

    with hooked(policy.model.get_input_embeddings(), move):
        yield


@contextmanager
def certain_token(policy: Policy, token: int) -> Iterator[None]:
    """Inside, the model gives `token` all of the probability."""

    def prefer(module: Any, inputs: Any, out: Any) -> Any:
        out.logits = torch.full_like(out.logits, -1e4)
        out.logits[..., token] = 1e4
        return out

    with hooked(policy.model, prefer):
        yield


@contextmanager
def hooked(module: Any, hook: Callable[[Any, Any, Any], Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def recorded_layers(policy: Policy) -> Iterator[list[list[Tensor]]]:
    """Inside, the states [tokens, D] behind each decoder layer, pass after pass, are kept."""
    layers = decoder_layers(policy.model)
    kept: list[list[Tensor]] = [[] for _ in layers]
    with ExitStack() as stack:
        for states, layer in zip(kept, layers, strict=True):

            def keep(module: Any, inputs: Any, out: Any, states: list[Tensor] = states) -> Any:
                first = out[0] if isinstance(out, tuple) else out
                states.append(first.detach().float().flatten(0, -2).cpu())
                return out

            stack.enter_context(hooked(layer, keep))
        yield kept
