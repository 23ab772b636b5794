"""How often the host waits for the device: once an update, once in 16 generated tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import make_questions, small_config
from interpreter import prepare_interpreter
from pretend_gpu.machine import PretendGpu, pretend_gpu
from transformers import PreTrainedTokenizerFast

from exgrpo_fast.build.models import make_policy
from exgrpo_fast.core import transfer
from exgrpo_fast.core.transfer import HostRead, to_device
from exgrpo_fast.core.types import Group, Trajectory, Verdict
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.rollout.engine import Request, Sampling
from exgrpo_fast.rollout.hf.decoding import TOKENS_UNSEEN
from exgrpo_fast.rollout.hf.engine import TransformersEngine
from exgrpo_fast.training.batch import WeightRule
from exgrpo_fast.training.learner import Learner
from exgrpo_fast.training.optim.optimiser import Optimiser
from exgrpo_kernels import PolicyObjective

prepare_interpreter()


@pytest.fixture
def gpu() -> Iterator[PretendGpu]:
    with pretend_gpu() as gpu:
        yield gpu


def policy_on_gpu(model_folder: Path) -> Policy:
    sections = {"train": {"max_tokens_per_microbatch": 40}, "data": {"max_prompt_tokens": 16}}
    config = small_config(model_folder, "right", sections)
    return make_policy(config, str(model_folder), device="cuda")


def make_groups(tokenizer: PreTrainedTokenizerFast) -> list[Group]:
    generator = torch.Generator().manual_seed(0)
    groups = []
    for question in make_questions(tokenizer, ["1", "2", "3"]):
        trajectories = [
            Trajectory(
                question,
                token_ids=torch.randint(280, (6,), generator=generator),
                behaviour_logprobs=torch.full((6,), -5.0),
                entropies=torch.zeros(6),
                truncated=False,
                verdict=Verdict(float(number)),
                source="replay" if number else "fresh",
            )
            for number in range(2)
        ]
        groups.append(Group(question, tuple(trajectories), advantages=(-1.0, 1.0)))
    return groups


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_an_update_of_several_packs_waits_once(
    ratio_level: str, tokenizer: PreTrainedTokenizerFast, model_folder: Path
) -> None:
    with pretend_gpu() as gpu:
        policy = policy_on_gpu(model_folder)
        optimiser = Optimiser(policy.trainable_parameters, lr=1e-3)
        rule = WeightRule("token_mean", max_completion_tokens=8)
        learner = Learner(policy, optimiser, weights=rule)
        groups = make_groups(tokenizer)
        objective = PolicyObjective(ratio_level=ratio_level)  # pyright: ignore
        learner.update(groups, objective)
        with gpu.waits.during() as waits:
            report = learner.update(groups, objective)
    assert report.tokens_trained == 36 and len(report.sums.replay_ratios) == 2  # packs
    assert len(waits) == 1, waits.report()


def test_generation_waits_once_in_16_tokens(
    tokenizer: PreTrainedTokenizerFast, model_folder: Path
) -> None:
    num_tokens = 3 * TOKENS_UNSEEN
    with pretend_gpu() as gpu:
        engine = TransformersEngine(policy_on_gpu(model_folder), eos_token_ids=[-1], pad_token_id=0)
        prompts = [q.prompt_ids for q in make_questions(tokenizer, ["1", "1234"])]
        requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
        with gpu.waits.during() as waits:
            completions = engine.generate(requests, Sampling(num_tokens))
    assert [len(c.token_ids) for c in completions] == [num_tokens, num_tokens]
    assert all(bool((c.logprobs < 0).all()) for c in completions)  # they have arrived
    assert len(waits) == num_tokens // TOKENS_UNSEEN, waits.report()


def test_tensors_arrive_in_one_copy(gpu: PretendGpu) -> None:
    given = [torch.arange(3), torch.tensor([True]), torch.rand(2, 5), torch.empty(0)]
    moved = to_device(given, "cuda")
    assert len(gpu.waits) == 0 and all(tensor.is_cuda for tensor in moved)
    for tensor, expected in zip(moved, given, strict=True):
        assert tensor.dtype == expected.dtype and torch.equal(tensor.cpu(), expected)


def test_figures_are_waited_for_only_where_nothing_else_was(gpu: PretendGpu) -> None:
    figures = [torch.ones(2, device="cuda"), torch.zeros((), device="cuda")]
    alone, beside = HostRead(figures), HostRead(figures)
    with gpu.waits.during() as waits:
        assert alone.values().tolist() == [1.0, 1.0, 0.0]
    assert len(waits) == 1
    with gpu.waits.during() as waits:
        assert beside.values().tolist() == [1.0, 1.0, 0.0]
    assert len(waits) == 0


def test_pinned_memory_is_hardly_larger_than_what_it_holds(
    gpu: PretendGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch's allocator rounds each allocation up to a power of two."""
    monkeypatch.setattr(transfer, "ARENA_BYTES", 2**12)
    sizes = [900, 33, 17, 130, 260] * 20
    given = [torch.full((n,), n, dtype=torch.int32, device="cuda") for n in sizes]
    memory = transfer.pinned_like(given)
    for copy, tensor in zip(memory, given, strict=True):
        copy.copy_(tensor, non_blocking=True)
    torch.cuda.synchronize()
    assert all(copy.tolist() == [n] * n for copy, n in zip(memory, sizes, strict=True))
    taken = {copy.untyped_storage().data_ptr(): copy.untyped_storage() for copy in memory}
    rounded = sum(1 << (storage.nbytes() - 1).bit_length() for storage in taken.values())
    assert rounded < 1.15 * 4 * sum(sizes)
