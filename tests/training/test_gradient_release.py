"""Released gradients make the usual update, bit for bit, and hold two gradients at a time."""

from __future__ import annotations

import importlib.util
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_questions, peak_bytes, small_config
from test_guards import Device
from test_learner import assert_same, moments, weights
from test_resume import restore_run
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config

from exgrpo_fast.config import Config, ConfigError, refuse_world_size
from exgrpo_fast.core.packs import tokens_of_share
from exgrpo_fast.core.types import Group
from exgrpo_fast.memory.tracing import Setting, Tracer
from exgrpo_fast.memory.trainer_memory import Head, PackShape, released, states, update
from exgrpo_fast.model.oom import OutOfMemory
from exgrpo_fast.model.packing import fill
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.training.batch import SeveralPacks, WeightRule
from exgrpo_fast.training.learner import Learner
from exgrpo_fast.training.optim import optimiser as optim
from exgrpo_fast.training.optim.gradient_release import HalfApplied, ReleasingOptimiser
from exgrpo_fast.training.optim.optimiser import Optimiser
from exgrpo_fast.training.preflight import rehearse, worst_groups
from exgrpo_kernels import PolicyObjective

OBJECTIVE = PolicyObjective()
VOCABULARY, WIDTH, PROMPT, RESPONSE = 200, 32, 8, 12
TOKENS = 2 * (PROMPT + 4 * (RESPONSE - 1))  # all of the batch below, in one pack
KINDS = (Optimiser, ReleasingOptimiser)


def make_learner(
    kind: type[Optimiser],
    *,
    is_tied: bool = False,
    dtype: torch.dtype = torch.float32,
    pack_tokens: int = TOKENS,
    optimiser: Any = None,
    width: int = WIDTH,
    **policy: Any,
) -> Learner:
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=is_tied,
    )
    torch.manual_seed(0)
    made = Policy(
        AutoModelForCausalLM.from_config(config, dtype=dtype),
        compute_dtype=dtype,
        max_tokens_per_microbatch=pack_tokens,
        **{"gradient_checkpointing": True, **policy},
    )
    return Learner(
        made,
        kind(made.trainable_parameters, **{"lr": 1e-3, **(optimiser or {})}),
        weights=WeightRule("token_mean", RESPONSE),
    )


def batch(behaviour: float = -5.3) -> list[Group]:
    """Near the log-probability of a random token, so that few ratios are clipped."""
    groups = worst_groups(
        2, 4, prompt_tokens=PROMPT, completion_tokens=RESPONSE, vocabulary=VOCABULARY
    )
    return [
        replace(
            group,
            trajectories=tuple(
                replace(t, behaviour_logprobs=torch.full((RESPONSE,), behaviour))
                for t in group.trajectories
            ),
        )
        for group in groups
    ]


def state_of(learner: Learner) -> dict[str, Any]:
    parameters = dict(learner.policy.model.named_parameters())
    return {"weights": copy_of(parameters), "moments": copy_of(moments_of(learner))}


def moments_of(learner: Learner) -> dict[str, Any]:
    return learner.optimiser.state_dict()["moments"]


def copy_of(value: Any) -> Any:
    """Of tensors in dictionaries, as quantised moments are."""
    if isinstance(value, dict):
        return {name: copy_of(inner) for name, inner in value.items()}
    return value.detach().clone()


def assert_same_updates(learners: list[Learner], count: int = 4) -> list[float]:
    """Losses, norms and metrics of `count` updates, then weights and moments; returns the norms."""
    reports = [[each.update(batch(), OBJECTIVE) for each in learners] for _ in range(count)]
    for usual, ours in reports:
        for name in ("losses", "grad_norms", "lr", "tokens_trained", "kernel_metrics", "skipped"):
            assert getattr(ours, name) == getattr(usual, name), name
        assert usual.losses and not usual.skipped
        assert ours.sums.read_metrics() == usual.sums.read_metrics()
    usual, ours = map(state_of, learners)
    assert_same(ours, usual)
    assert len(ours["moments"]) == len(ours["weights"])
    assert all(p.grad is None for p in learners[1].policy.trainable_parameters)
    return [norm for usual, _ in reports for norm in usual.grad_norms]


# --- the same update ------------------------------------------------------------------------------


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("max_grad_norm", [1e-2, 1e2])
def test_the_update_is_the_usual_one(is_tied: bool, max_grad_norm: float) -> None:
    settings = {"max_grad_norm": max_grad_norm}
    learners = [make_learner(kind, is_tied=is_tied, optimiser=settings) for kind in KINDS]
    norms = assert_same_updates(learners)
    assert all((norm > max_grad_norm) == (max_grad_norm == 1e-2) for norm in norms)


@pytest.mark.parametrize(
    "policy",
    [
        {"gradient_checkpointing": False},
        {"tile_tokens": 16},
        {"tile_tokens": 16, "gradient_checkpointing": False},
        {"offload_activations": True},
    ],
)
def test_however_the_pass_is_made(policy: dict[str, Any]) -> None:
    assert_same_updates([make_learner(kind, **policy) for kind in KINDS], count=2)


@pytest.mark.parametrize("is_tied", [False, True])
def test_bfloat16_weights(is_tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's own AdamW, which no run is offered: its steps are plain arithmetic."""

    def plain(kind: str, parameters: list[nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, **settings)

    monkeypatch.setattr(optim, "make_adamw", plain)
    assert_same_updates([make_learner(k, is_tied=is_tied, dtype=torch.bfloat16) for k in KINDS])


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
def test_8_bit_moments() -> None:
    settings = {"kind": "adamw_8bit"}
    learners = [make_learner(kind, width=128, optimiser=settings) for kind in KINDS]
    assert_same_updates(learners, count=2)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
def test_what_is_rounded_at_random_is_rounded_by_the_number_of_the_update() -> None:
    settings: dict[str, Any] = {"optimiser": {"kind": "adamw_8bit"}, "dtype": torch.bfloat16}
    found = []
    for seed in (1, 2):
        learner = make_learner(ReleasingOptimiser, width=128, **settings)
        torch.manual_seed(seed)
        noise = torch.get_rng_state()
        learner.update(batch(), OBJECTIVE)
        assert torch.equal(noise, torch.get_rng_state())
        found.append(state_of(learner))
    assert_same(*found)


def test_the_forward_pass_runs_once() -> None:
    learner = make_learner(ReleasingOptimiser)
    hidden_states, seen = learner.policy.hidden_states, []
    learner.policy.hidden_states = lambda packed: (seen.append(1), hidden_states(packed))[1]
    learner.update(batch(), OBJECTIVE)
    assert len(seen) == 1


# --- what it holds --------------------------------------------------------------------------------


@pytest.mark.parametrize("is_tied", [False, True])
def test_two_gradients_live_at_a_time(is_tied: bool) -> None:
    """The head's, and one other; of a tied head, the embedding's part of its own."""
    live: dict[type[Optimiser], int] = {}
    for kind in KINDS:
        learner = make_learner(kind, is_tied=is_tied)
        parameters, sizes = learner.policy.trainable_parameters, []

        def count(_: Tensor, parameters: Any = parameters, sizes: list[int] = sizes) -> None:
            sizes.append(sum(p.grad.nbytes for p in parameters if p.grad is not None))

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(count)
        learner.update(batch(), OBJECTIVE)
        live[kind] = max(sizes)
    everything = sum(p.nbytes for p in learner.policy.trainable_parameters)
    head = 4 * VOCABULARY * WIDTH
    other = 4 * 3 * WIDTH * WIDTH if is_tied else head  # of an MLP, or of the embedding
    assert live == {Optimiser: everything, ReleasingOptimiser: head + other}


def test_an_update_takes_what_was_planned() -> None:
    """Every byte that `Learner.update` allocates, as the profiler records them."""
    width, peaks = 128, {}
    for kind in KINDS:
        learner = make_learner(kind, width=width)
        learner.update(batch(), OBJECTIVE)  # the optimiser makes its states here
        peaks[kind] = peak_bytes(lambda learner=learner: learner.update(batch(), OBJECTIVE))
    config = learner.policy.model.config
    size = torch.float32
    passes = Tracer(config, Setting(size, size, True, gradient_release=True))(TOKENS)
    head = Head(VOCABULARY, width, is_trained=True)
    held = states(passes, weights=size, optimiser="adamw", references=0, is_nf4=False)
    ours = released(held, head, size)
    assert (ours.resident, ours.gradients) == (held.resident, 4 * VOCABULARY * width)
    made = update(passes, head, PackShape(TOKENS, size, size, "cpu"))
    assert ours.gradients + made.peak == pytest.approx(peaks[ReleasingOptimiser], rel=0.05)
    assert peaks[Optimiser] > 1.5 * peaks[ReleasingOptimiser]


# --- what does not move ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behaviour", "skip_grad_norm", "reason"),
    [
        (float("nan"), 500.0, "update_not_finite"),
        (-5.3, 1e-9, "update_gradient_too_large"),
    ],
)
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_refused_update_changes_nothing(
    is_tied: bool, behaviour: float, skip_grad_norm: float, reason: str
) -> None:
    learner = make_learner(ReleasingOptimiser, is_tied=is_tied)
    learner.update(batch(), OBJECTIVE)
    before = state_of(learner)
    learner.optimiser.skip_grad_norm = skip_grad_norm
    report = learner.update(batch(behaviour), OBJECTIVE)
    assert report.skipped == {reason: 1} and len(report.refused) == 1
    assert_same(state_of(learner), before)
    assert learner.optimiser.num_updates == 1
    assert all(p.grad is None for p in learner.policy.trainable_parameters)
    learner.optimiser.skip_grad_norm = 500.0
    assert not learner.update(batch(), OBJECTIVE).skipped


def test_a_gradient_that_is_not_finite_in_one_weight_alone() -> None:
    """The forward pass, the loss and the gradients of all later layers are finite."""
    learner = make_learner(ReleasingOptimiser)
    learner.update(batch(), OBJECTIVE)
    before = state_of(learner)
    first = learner.policy.model.model.layers[0].self_attn.q_proj.weight
    first.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), float("nan")))
    assert learner.update(batch(), OBJECTIVE).skipped == {"update_not_finite": 1}
    assert_same(state_of(learner), before)


def test_several_packs_are_refused_before_anything_changes() -> None:
    learner = make_learner(ReleasingOptimiser, pack_tokens=TOKENS - 1)
    before = state_of(learner)
    with pytest.raises(SeveralPacks, match="2 packs of at most .* raise train.max_tokens_per"):
        learner.update(batch(), OBJECTIVE)
    assert_same(state_of(learner), before)


class TwoUses(nn.Module):
    """A weight whose gradient is finished before the backward pass needs it for the last time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))

    def loss(self) -> Tensor:
        hidden = (torch.ones(3, 4) @ self.first) @ self.second.detach()
        return (hidden.tanh() @ self.second).square().sum()


@pytest.mark.parametrize("is_seen", [True, False])
def test_a_weight_that_is_needed_once_more_is_not_changed_in_silence(is_seen: bool) -> None:
    """Nor by a kernel that writes behind autograd's back."""
    model = TwoUses()
    optimiser = ReleasingOptimiser(list(model.parameters()), lr=1e-3)

    def write_unseen() -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data.add_(1.0)

    if not is_seen:
        setattr(optimiser.adamw, "step", write_unseen)  # noqa: B010
    optimiser.backward(model.loss())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        optimiser.step()


# --- out of memory --------------------------------------------------------------------------------


def test_out_of_memory_halves_the_chunk_and_parts_nothing() -> None:
    learner = make_learner(ReleasingOptimiser)
    before = state_of(learner)
    device = Device(learner.policy, TOKENS - 1)
    with pytest.raises(OutOfMemory, match="gradient_release.*raise train.minibatches") as caught:
        learner.update(batch(), OBJECTIVE)
    assert device.refused == 2 and learner.policy.sizes.chunk_rows is not None
    assert learner.policy.max_tokens_per_microbatch == TOKENS
    assert "gradient of the head     0.00 GiB" in caught.value.table
    assert_same(state_of(learner), before)
    device.limit = TOKENS
    assert not learner.update(batch(), OBJECTIVE).skipped


def test_out_of_memory_between_two_weights_ends_the_run() -> None:
    learner = make_learner(ReleasingOptimiser)
    step, calls = learner.optimiser.adamw.step, []

    def third_fails() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        step()

    setattr(learner.optimiser.adamw, "step", third_fails)  # noqa: B010
    with pytest.raises(HalfApplied, match="half updated and are not saved: --resume auto"):
        learner.update(batch(), OBJECTIVE)


def test_the_rehearsal_is_one_pack_and_changes_nothing() -> None:
    learner = make_learner(ReleasingOptimiser)
    before, seen = state_of(learner), []
    hidden_states = learner.policy.hidden_states
    learner.policy.hidden_states = lambda packed: (seen.append(1), hidden_states(packed))[1]
    rehearse(
        learner, OBJECTIVE, prompt_tokens=PROMPT, completion_tokens=RESPONSE, state_bytes=1000.0
    )
    assert len(seen) == 2  # scored, and differentiated
    assert_same(state_of(learner), before)
    assert all(p.grad is None for p in learner.policy.trainable_parameters)
    assert not learner.update(batch(), OBJECTIVE).skipped


def test_a_pack_of_one_completion_is_rehearsed_too() -> None:
    learner = make_learner(ReleasingOptimiser, pack_tokens=PROMPT + RESPONSE)
    seen, hidden_states = [], learner.policy.hidden_states
    learner.policy.hidden_states = lambda packed: (seen.append(1), hidden_states(packed))[1]
    rehearsal = rehearse(
        learner, OBJECTIVE, prompt_tokens=PROMPT, completion_tokens=RESPONSE, state_bytes=1000.0
    )
    assert rehearsal.sequences == 1 and len(seen) == 2


# --- a run ----------------------------------------------------------------------------------------

TRAIN: dict[str, Any] = {"minibatches": 2, "warmup_steps": 3, "max_grad_norm": 0.05}
RELEASE: dict[str, Any] = {"gradient_release": True, "max_tokens_per_microbatch": "auto"}


@pytest.fixture
def make(tokenizer, make_test_trainer):
    """A trainer with replay, checkpointing and dropout."""

    def make_one(**train: Any):
        questions = make_questions(tokenizer, [f"q{i}" for i in range(8)])
        trainer = make_test_trainer(
            questions,
            function="even_length",
            model={"gradient_checkpointing": True},
            replay={"enabled": True, "start_success_rate": 0.0, "retire": False},
            train=TRAIN | train,
        )
        for layer in trainer.learner.policy.model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        return trainer

    return make_one


def told(metrics: dict[str, Any]) -> dict[str, Any]:
    """Without what is measured in seconds."""
    return {
        k: v for k, v in metrics.items() if "second" not in k and "per_" not in k and k != "time"
    }


def test_a_run_with_release_is_the_run_without_and_can_become_it(make) -> None:
    """Metrics of three steps; then the released run is taken up without release."""
    usual, ours = make(), make(**RELEASE)
    assert isinstance(ours.learner.optimiser, ReleasingOptimiser)
    for trainer in (usual, ours):
        torch.manual_seed(0)
        trainer.found = [trainer.step()[1] for _ in range(3)]
    for theirs, row in zip(usual.found, ours.found, strict=True):
        assert row["grad_norm"] > TRAIN["max_grad_norm"]
        assert told(row) == told(theirs)
    assert any(row["replay_ratio_mean"] is not None for row in ours.found)
    assert_same(weights(ours), weights(usual))
    assert_same(moments(ours), moments(usual))
    path = ours.save()
    expected = usual.step()[1]
    for keys in ({}, RELEASE):
        resumed = make(**keys)
        restore_run(resumed, path)
        assert resumed.step()[1]["loss_hex"] == expected["loss_hex"]
        assert_same(weights(resumed), weights(usual))


def test_a_pack_that_once_did_not_fit_is_not_taken_up(make) -> None:
    """The size that another kind of update was halved to would part this one."""
    first = make(max_tokens_per_microbatch=4096)
    first.learner.policy.sizes.max_tokens_per_microbatch = 64
    state = first.state_dict()
    again = make(**RELEASE | {"max_tokens_per_microbatch": 4096})
    again.load_state_dict(state)
    assert again.learner.policy.max_tokens_per_microbatch == 4096


# --- the config -----------------------------------------------------------------------------------


def config_with(**sections: Any) -> Config:
    """4 questions of up to 32 tokens, 4 responses of up to 12 to each."""
    sections["train"] = RELEASE | sections.get("train", {})
    return small_config(Path("model"), "right", sections)


def test_auto_is_a_pack_that_holds_any_update() -> None:
    group = 32 + 4 * 12
    assert config_with().microbatch_tokens == 4 * group
    assert config_with(train={"minibatches": 2}).microbatch_tokens == 2 * group
    appended = {"replay": {"enabled": True, "mixer": "append", "count": 2}}
    assert config_with(**appended).microbatch_tokens == 4 * (group + 2 * 12)
    revised = {"hindsight": {"enabled": True, "max_prompt_tokens": 100}}
    assert config_with(**revised).microbatch_tokens == 4 * (group + 100 + 12)
    assert config_with(train={"max_tokens_per_microbatch": 999}).microbatch_tokens == 999


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"model": {"lora": {}}}, "train.gradient_release is for runs that train all weights"),
        (
            {"replay": {"enabled": True, "mixer": "append", "select": "all"}},
            "train.gradient_release needs a bound .* replay.select all",
        ),
    ],
)
def test_what_does_not_go_with_it(sections: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        config_with(**sections)


def test_a_pack_is_as_large_as_the_share_of_a_rank() -> None:
    """Two ranks: half of 320 tokens, and what the last sequence and a prompt that is read twice add."""
    whole = config_with()
    least = 160 + 22 + 44
    assert [whole.released_tokens(ranks) for ranks in (1, 2, 100)] == [320, least, 91]
    assert whole.preferred_tokens(2) == least and whole.microbatch_tokens == 320
    for ranks, tokens, fits in ((1, 320, True), (1, 319, False), (2, least, True), (2, 225, False)):
        config = config_with(train={"max_tokens_per_microbatch": tokens})
        if fits:
            refuse_world_size(config, ranks)
            continue
        with pytest.raises(ConfigError, match=rf"\({tokens}\) is below the (320|{least}) tokens"):
            refuse_world_size(config, ranks)


@pytest.mark.parametrize("seed", range(20))
def test_an_update_is_never_more_packs_than_ranks(seed: int) -> None:
    """Sequences of random lengths, in packs as large as the share of a rank."""
    draw = random.Random(seed)
    ranks, lengths, prompts, prompt_of = draw.randint(1, 9), [], [], []
    for number in range(draw.randint(1, 12)):
        prompt = draw.randint(1, 60)
        for _ in range(draw.randint(1, 9)):
            prompts.append(prompt)
            prompt_of.append(number)
            lengths.append(draw.randint(1, 200))
    once = dict(zip(prompt_of, prompts, strict=True))
    total = sum(once.values()) + sum(lengths)
    longest = max(map(sum, zip(prompts, lengths, strict=True)))
    sizes = map(torch.tensor, (prompts, lengths, prompt_of))
    packs = fill(*sizes, max_tokens=tokens_of_share(total, longest, ranks))
    assert 1 <= len(packs) <= ranks
