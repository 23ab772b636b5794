"""Proof at the start of a run that every way through the model gives the same log-probs.

A few short sequences are drawn by the engine and read by the plain model, exactly as transformers
loads it: its own attention, no padding. Compared with it:

    packed       the forward pass of the update: several sequences in a pack, prompts shared
    head         what the losses take for the head, on states that give large logits
    update       the same in training mode; a difference is dropout, or noise of a router, and so is
                 a random number that is drawn
    engine       the log-probs with which the engine drew: left padding, a cache
    end token    the engine stops at each end token, and at no other
    adapter      random adapters as separate layers, against their merged weights
    checkpoint   what would be saved: every weight of the model, under its own name

It is the same module throughout: no second copy of the weights. A pass costs its tokens and, on a
CPU, some twenty more. So one sequence alone is long, it is read three times (drawn, packed in
training mode, where noise of a router shows in few tokens, and plain), and the other parts read
short ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.core.text import first_line
from exgrpo_fast.core.types import Completion
from exgrpo_fast.model.attention.interface import UnsupportedAttention
from exgrpo_fast.model.lora import has_adapter, merged_weights, random_adapter, running_merged
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.rollout.engine import Request, RolloutEngine, Sampling
from exgrpo_fast.rollout.hf.decoding import cached_windows
from exgrpo_fast.rollout.hf.engine import TransformersEngine
from exgrpo_fast.rollout.plain_model import (
    COMPLETION_TOKENS,
    LOGITS,
    Probe,
    certain_token,
    head_pass,
    made_up,
    plain_pass,
    probe_prompts,
    recorded_layers,
    rounded_embeddings,
)

Part = Literal["packed", "head", "update", "engine", "end token", "adapter", "checkpoint"]
T = TypeVar("T")

# Of the sequences, see `probe_prompts`: the short ones, and the two of one prompt.
SHORT, PAIR = slice(0, 3), slice(0, 2)
# A gap is compared with what one more rounding of the embeddings does to the same log-probs. Over
# random models of 34 families, 2 to 24 layers deep, and SmolLM2, the gap of a right forward pass is
# at most 3.0 times that in bfloat16; in float32 5.0 times, at gaps of 1e-7.
ROUNDINGS = 8.0
# Explained without such a pass: the rounding of the logits themselves, for logits of size 1 or less.
LEAST_TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# What goes wrong inside the code of a family.
FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
TENSOR_FLOAT32 = 2.0**-10  # what tensor cores keep of a float32, where a GPU uses them


class ForwardMismatch(UserError):
    """One way through the model is not the plain model."""

    def __init__(self, family: str, part: Part, what: str) -> None:
        super().__init__(
            f"{family}: the forward pass is not that of the plain model ({part}: {what})"
        )
        self.part = part


@dataclass(frozen=True)
class ForwardReport:
    """Largest mean |log-prob difference| of a sequence, by part, and what rounding explains."""

    gaps: dict[str, float]
    tolerance: float

    def __str__(self) -> str:
        found = ", ".join(f"{part} {gap:.0e}" for part, gap in self.gaps.items())
        return f"forward pass checked: {found}"


class Reference:
    """Log-probs of the plain model, and how much of a difference from them rounding explains."""

    def __init__(self, policy: Policy, probe: Probe) -> None:
        self.policy, self.probe = policy, probe
        with policy.as_loaded():
            self.logprobs, logit_size = plain_pass(policy, probe)
        least = LEAST_TOLERANCE[policy.compute_dtype]
        if uses_tensor_float32(policy):
            least = TENSOR_FLOAT32
        self.least = least * max(1.0, logit_size)

    @cached_property
    def tolerance(self) -> float:
        """By one more pass of the plain model, with its embeddings rounded once more.

        Over all sequences, as gaps are: what a rounding does differs from one to the next.
        """
        with self.policy.as_loaded(), rounded_embeddings(self.policy):
            rounded = plain_pass(self.policy, self.probe).logprobs
        return max(self.least, ROUNDINGS * gap(rounded, self.logprobs))


def check_forward(
    policy: Policy,
    engine: RolloutEngine | None,
    *,
    prompt_ids: Sequence[int],
    eos_token_ids: Sequence[int],
    longest: int | None = None,
    engine_tolerance: float | None = None,
) -> ForwardReport:
    """ForwardMismatch with family, part and size where the parts disagree.

    `prompt_ids`: of any question; `engine`: without a log around it, None = no engine here;
    `eos_token_ids`: those of tokenizer and model; `longest`: tokens that a sequence may have;
    `engine_tolerance`: of an engine with other arithmetic, such as vLLM.
    """
    devices = [policy.device] if policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        check = _ForwardCheck(policy, prompt_ids, longest)
        return check.run(engine, eos_token_ids, engine_tolerance)


class _ForwardCheck:
    def __init__(self, policy: Policy, prompt_ids: Sequence[int], longest: int | None) -> None:
        self.policy = policy
        self.family = str(policy.model.config.model_type)
        self.prompts = probe_prompts(prompt_ids, longest)
        self.sampling = Sampling(COMPLETION_TOKENS, policy.temperature)
        self.gaps: dict[str, float] = {}
        self.tolerance = 0.0

    def run(
        self,
        engine: RolloutEngine | None,
        eos_token_ids: Sequence[int],
        engine_tolerance: float | None,
    ) -> ForwardReport:
        drawn = self._draw(engine, eos_token_ids)
        probe = Probe(self.prompts, [completion.token_ids for completion in drawn])
        plain = Reference(self.policy, probe)

        evaluated = probe if self.policy.dropout else probe.pick(SHORT)
        packed, kernels_draw = self._packed("packed", evaluated)
        if not self.policy.attention_calls:
            raise ForwardMismatch(
                self.family,
                "packed",
                f"its attention cannot be replaced by one that keeps the sequences of a pack apart: "
                f"log-probs differ by {gap(packed, plain.logprobs[: len(packed)]):.1e}",
            )
        windows = self._attempt("head", self._check_head)
        self._compare_packed(packed, plain)
        if not self.policy.dropout:
            self._check_update(plain, kernels_draw)
        if engine is not None:
            logprobs = [completion.logprobs for completion in drawn]
            self._compare("engine", logprobs, plain, tolerance=engine_tolerance)
        if isinstance(engine, TransformersEngine):
            self._check_cache(windows)
            self._attempt("end token", lambda: self._check_end_tokens(engine, eos_token_ids))
        if has_adapter(self.policy.model):
            self._attempt("adapter", lambda: self._check_adapter(probe.pick(PAIR)))
        if (fault := checkpoint_fault(self.policy.model)) is not None:
            raise ForwardMismatch(self.family, "checkpoint", fault)
        return ForwardReport(self.gaps, self.tolerance)

    # --- parts ---

    def _draw(self, engine: RolloutEngine | None, eos_token_ids: Sequence[int]) -> list[Completion]:
        if engine is None:
            return [
                made_up(len(self.policy.head.weight), seed) for seed in range(len(self.prompts))
            ]
        requests = [Request(prompt, seed) for seed, prompt in enumerate(self.prompts)]
        short, long = requests[SHORT], requests[SHORT.stop :]  # the short ones padded among them
        shares_weights = isinstance(engine, TransformersEngine)
        with engine.same_weights(requests, self.sampling) if shares_weights else nullcontext():
            drawn = self._attempt(
                "engine",
                lambda: (
                    engine.generate(short, self.sampling) + engine.generate(long, self.sampling)
                ),
            )
        for completion in drawn:
            self._check_end(completion, eos_token_ids)
        return drawn

    def _check_end(self, completion: Completion, eos_token_ids: Sequence[int]) -> None:
        ends = [token in eos_token_ids for token in completion.token_ids.tolist()]
        if any(ends[:-1]) or ends[-1] == completion.truncated:
            raise ForwardMismatch(
                self.family,
                "end token",
                f"the engine ended with token {int(completion.token_ids[-1])} or went on behind "
                f"an end token; the end tokens are {list(eos_token_ids)}",
            )

    def _check_end_tokens(self, engine: TransformersEngine, eos_token_ids: Sequence[int]) -> None:
        """Each of them made certain, in turn."""
        two_tokens = Sampling(2, self.policy.temperature)
        for token in eos_token_ids:
            with certain_token(engine.policy, token):
                (completion,) = engine.generate([Request(self.prompts[0][:1], 0)], two_tokens)
            if completion.truncated or completion.token_ids.tolist() != [token]:
                raise ForwardMismatch(
                    self.family, "end token", f"the engine goes on behind token {token}"
                )

    def _packed(self, part: Literal["packed", "update"], probe: Probe) -> tuple[list[Tensor], bool]:
        """Log-probs of the forward pass over packs, in training mode for the update, and whether it
        drew random numbers."""
        score = self.policy.score if part == "packed" else self.policy.score_in_training_mode
        before = random_state(self.policy.device)
        scores = self._attempt(part, lambda: score(*probe.ragged()))
        drew = not torch.equal(before, random_state(self.policy.device))
        return [logprobs for logprobs, _ in scores.split()], drew

    def _check_update(self, plain: Reference, kernels_draw: bool) -> None:
        trained, drew = self._packed("update", plain.probe)
        drew = self.policy.processes.any(drew and not kernels_draw)
        if drew and not may_draw(self.policy.model):
            raise ForwardMismatch(
                self.family,
                "update",
                f"it draws random numbers in training mode: log-probs differ by "
                f"{gap(trained, plain.logprobs):.1e}",
            )
        try:
            self._compare("update", trained, plain)
        except ForwardMismatch:  # of training mode alone, or of the long sequence?
            packed, _ = self._packed("packed", plain.probe)
            self._compare_packed(packed, plain)
            raise

    def _check_head(self) -> dict[int, int | None]:
        """The window of each layer."""
        try:
            of_model, own, windows = head_pass(self.policy)
        except UnsupportedAttention as error:
            raise ForwardMismatch(self.family, "packed", str(error)) from None
        if of_model.shape != own.shape:
            what = f"the model has {of_model.shape[1]} logits, and its head {own.shape[1]} rows"
            raise ForwardMismatch(self.family, "head", what)
        dtype, size = self.policy.compute_dtype, gap([*of_model], [*own])
        unit = TENSOR_FLOAT32 if uses_tensor_float32(self.policy) else torch.finfo(dtype).eps
        if not size <= (tolerance := max(LEAST_TOLERANCE[dtype], 4 * LOGITS * unit)):
            raise ForwardMismatch(
                self.family,
                "head",
                f"log-probs differ by {size:.1e} behind large logits, rounding explains "
                f"{tolerance:.0e}: the model changes its logits after the head",
            )
        return windows

    def _check_cache(self, windows: dict[int, int | None]) -> None:
        """A cache that keeps other tokens than its layer sees: a window that the model does not have."""
        for layer, kept in enumerate(cached_windows(self.policy.model.config)):
            if windows.get(layer, kept) != kept:
                sees = [f"{n} tokens" if n else "all tokens" for n in (windows[layer], kept)]
                raise ForwardMismatch(
                    self.family,
                    "engine",
                    f"layer {layer} sees {sees[0]}, and by the config its cache keeps {sees[1]}",
                )

    def _check_adapter(self, probe: Probe) -> None:
        model = self.policy.model
        with random_adapter(model):
            adapted = Reference(self.policy, probe)
            with running_merged(model), self.policy.as_loaded():
                merged = plain_pass(self.policy, probe).logprobs
            self._compare("adapter", merged, adapted)

    # --- comparing ---

    def _compare_packed(self, packed: Sequence[Tensor], plain: Reference) -> None:
        self._compare("packed", packed, plain, where=lambda: self._first_layer(plain.probe))

    def _compare(
        self,
        part: Part,
        found: Sequence[Tensor],
        plain: Reference,
        *,
        tolerance: float | None = None,
        where: Callable[[], str] = lambda: "",
    ) -> None:
        """`found`: of the first sequences or all; `tolerance`: None = what rounding explains."""
        self.gaps[part] = size = gap(found, plain.logprobs[: len(found)])
        if tolerance is None:
            # More passes are collectives, so ranks whose figures differ by a rounding ask together.
            is_small = not self.policy.processes.any(not size <= plain.least)
            tolerance = plain.least if is_small else plain.tolerance
        self.tolerance = max(self.tolerance, tolerance)
        if not size <= tolerance:  # NaN as well
            raise ForwardMismatch(
                self.family,
                part,
                f"log-probs differ by {size:.1e}, rounding explains {tolerance:.0e}{where()}",
            )

    def _attempt(self, part: Part, work: Callable[[], T]) -> T:
        """What `work` returns; what goes wrong inside a family's own code is a mismatch."""
        try:
            return work()
        except torch.OutOfMemoryError:
            raise
        except UserError as error:
            if isinstance(error, ForwardMismatch):
                raise
            raise ForwardMismatch(self.family, part, str(error)) from None
        except FAULTS as error:
            said = first_line(error) if str(error).strip() else "no message"
            what = f"its own code fails, {type(error).__name__}: {said}"
            raise ForwardMismatch(self.family, part, what) from error

    def _first_layer(self, probe: Probe) -> str:
        """The first decoder layer whose output is another, as the end of a sentence."""
        policy = self.policy
        try:
            with recorded_layers(policy) as packed:
                policy.score(*probe.ragged())
            with recorded_layers(policy) as plain, policy.as_loaded():
                plain_pass(policy, probe)
        except Exception:  # of a part of the message alone
            return ""
        # The longest sequence is the first of its pack, and has no neighbour before it; so all
        # tokens are compared as a set: sorted by the sum of each state.
        for number, layer in enumerate(zip(packed, plain, strict=False)):
            ours, theirs = (torch.cat(list(states)) for states in layer)
            furthest = float(torch.cdist(ours, theirs).amin(-1).max())
            if not furthest <= 1e-2 * float(theirs.norm(dim=-1).mean()):
                return f", from layer {number} on"
        return ""


def gap(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest mean |difference| of a sequence; NaN where one is."""
    pairs = zip(found, expected, strict=True)
    means = [(a.float().cpu() - b.float().cpu()).abs().mean() for a, b in pairs]
    return float(torch.stack(means).max())


def uses_tensor_float32(policy: Policy) -> bool:
    return policy.device.type == "cuda" and policy.compute_dtype == torch.float32


def random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def may_draw(model: torch.nn.Module) -> bool:
    """Where random numbers in training mode need no noise of the model's own: an adapter's dropout, and
    layerdrop, which draws one for each layer even where it is 0."""
    return any(
        hasattr(module, "layerdrop") or ("lora_dropout" in name and getattr(module, "p", 0.0) > 0.0)
        for name, module in model.named_modules()
    )


# --- checkpoint -----------------------------------------------------------------------------------


def checkpoint_fault(model: Any) -> str | None:
    """What a checkpoint of `model` would lack or have too much of, by names and shapes; or None.

    Expected is what the model's class makes of its config, on no device.
    """
    with torch.device("meta"):
        shell = type(model)(copy.deepcopy(model.config))
    expected = {name: tuple(weight.shape) for name, weight in shell.state_dict().items()}
    saved = {n: tuple(weight.shape) for n, weight in merged_weights(model, tied=True)}
    for name in sorted(expected.keys() | saved.keys()):
        if saved.get(name) != expected.get(name):
            return f"{name} would be saved as {saved.get(name)}, and is {expected.get(name)}"
    return None
