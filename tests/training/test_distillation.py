"""Distillation over the whole vocabulary as a run trains it: values and gradients against float64 models with
their logits in full, and what does not go with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_questions
from test_learner import GradientRecorder, collect
from torch import Tensor

from exgrpo_fast.build.folder import check_teacher
from exgrpo_fast.build.models import make_distillation
from exgrpo_fast.build.quickstart.toy_model import make_model
from exgrpo_fast.config import ConfigError, validate
from exgrpo_fast.core.types import Group
from exgrpo_fast.model.folder_reading import model_files
from exgrpo_fast.model.lora import trainable
from exgrpo_fast.model.policy import load_model
from exgrpo_fast.training.trainer import Trainer
from exgrpo_kernels import distillation_loss, runtime

F64 = torch.float64
COEF, MIXTURE, TEMPERATURE = 0.7, 0.3, 0.8
WHOLE = {"clip_low": None, "clip_high": None, "aggregation": "token_mean"}


@pytest.fixture(scope="module")
def teacher_folder(tokenizer, tmp_path_factory) -> Path:
    """Another random model, of another depth and width, and surer."""
    path = tmp_path_factory.mktemp("teacher")
    model = make_model(tokenizer, seed=1, layers=1, width=128)
    with torch.no_grad():
        model.lm_head.weight *= 4
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def distilling(tokenizer, make_test_trainer, teacher_folder) -> Callable[..., Trainer]:
    def make(divergence: str, *, rewards: bool = False, **sections: Any) -> Trainer:
        distillation = {
            "teacher": str(teacher_folder),
            "divergence": divergence,
            "mixture": MIXTURE,
            "coef": COEF,
            "rewards": rewards,
        }
        algorithm = WHOLE | {"distillation": distillation} | sections.pop("algorithm", {})
        rollout = {"temperature": TEMPERATURE}
        questions = make_questions(tokenizer, ["a", "b", "c", "d"])
        return make_test_trainer(
            questions, function="even_length", algorithm=algorithm, rollout=rollout, **sections
        )

    return make


# --- float64 ----------------------------------------------------------------------------------------


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def divergence_of(name: str, log_p: Tensor, log_t: Tensor) -> Tensor:
    middle = ((1 - MIXTURE) * log_p.exp() + MIXTURE * log_t.exp()).log()
    return {
        "reverse": lambda: kl(log_p, log_t),
        "forward": lambda: kl(log_t, log_p),
        "jsd": lambda: MIXTURE * kl(log_t, middle) + (1 - MIXTURE) * kl(log_p, middle),
    }[name]()


def exact(
    name: str, groups: list[Group], folders: tuple[Path, Path], *, rewards: bool
) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradients by name): whole logits of both models in float64, through autograd."""
    policy, teacher = (load_model(str(folder), dtype=F64).eval() for folder in folders)
    trajectories = [t for group in groups for t in group.trajectories]
    advantages = [a for group in groups for a in group.advantages]
    weight = 1 / sum(t.num_tokens for t in trajectories)
    loss = torch.zeros((), dtype=F64)
    for t, advantage in zip(trajectories, advantages, strict=True):
        prompt = list(t.question.prompt_ids)
        ids = torch.tensor([prompt + t.token_ids.tolist()])
        log_p, log_t = (
            (model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / TEMPERATURE).log_softmax(-1)
            for model in (policy, teacher)
        )
        loss = loss + weight * COEF * divergence_of(name, log_p, log_t.detach()).sum()
        if rewards:
            of_tokens = log_p.gather(1, t.token_ids[:, None])[:, 0]
            loss = loss - weight * advantage * (of_tokens - t.behaviour_logprobs).exp().sum()
    loss.backward()
    found = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    return loss.item(), found


def check(trainer: Trainer, name: str, folders: tuple[Path, Path], *, rewards: bool) -> None:
    """Loss and every gradient of one update to float32's rounding."""
    groups, learner = collect(trainer), trainer.learner
    learner.optimiser = recorder = GradientRecorder(learner.policy)
    report = learner.update(groups, trainer.objective)
    loss, gradients = exact(name, groups, folders, rewards=rewards)
    assert abs(loss) > 0.02
    assert report.loss == pytest.approx(loss, rel=2e-6)
    size = max(float(g.abs().max()) for g in gradients.values())
    (found,) = recorder.found
    assert found.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(found[key].double(), gradient, rtol=0, atol=1e-5 * size, msg=key)


@pytest.mark.parametrize("rewards", [False, True])
@pytest.mark.parametrize("name", ["reverse", "forward", "jsd"])
def test_an_update_is_that_of_whole_distributions(
    distilling, model_folder, teacher_folder, name: str, rewards: bool
) -> None:
    trainer = distilling(name, rewards=rewards)
    check(trainer, name, (model_folder, teacher_folder), rewards=rewards)


def swapped(log_p: Tensor, log_t: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return RIGHT(log_t, log_p, *rest)


def uncentred(log_p: Tensor, log_t: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    value, dz = RIGHT(log_p, log_t, *rest)
    return value, dz + log_p.exp() * value[:, None]


def unmixed(log_p: Tensor, log_t: Tensor, name: Any, mixture: float) -> tuple[Tensor, Tensor]:
    return RIGHT(log_p, log_t, name, 1 - mixture)


RIGHT = distillation_loss.row_divergences


@pytest.mark.parametrize(
    ("name", "fault"),
    [("reverse", swapped), ("forward", swapped), ("reverse", uncentred), ("jsd", unmixed)],
)
def test_a_wrong_formula_is_seen(
    distilling, model_folder, teacher_folder, monkeypatch, name: str, fault: Any
) -> None:
    trainer = distilling(name)
    monkeypatch.setattr(distillation_loss, "row_divergences", fault)
    with pytest.raises(AssertionError):
        check(trainer, name, (model_folder, teacher_folder), rewards=False)


def constant_logits(model: Any, logits: list[float]) -> None:
    """The same at every position: all states are equal, and one column of the head is not 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                parameter.zero_()
        model.model.embed_tokens.weight.fill_(100.0)  # beside which the norm's epsilon is nothing
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight[:, 0] = -1e4 * TEMPERATURE
        model.lm_head.weight[: len(logits), 0] = TEMPERATURE * torch.tensor(logits)


@pytest.mark.parametrize(
    ("name", "value", "slopes"),
    [
        ("reverse", 0.20371773, [0.28215977, -0.23174963, -0.06421437, 0.01380424]),
        ("forward", 0.20165443, None),
    ],
)
def test_the_row_in_closed_form_through_an_update(distilling, name, value, slopes) -> None:
    """Two distributions of four tokens, whose divergence was computed apart from this package."""
    trainer = distilling(name)
    groups, learner = collect(trainer), trainer.learner
    policy, teacher = [1.0, 0.2, -0.5, -1.5], [0.3, 0.9, -0.2, -2.0]
    constant_logits(learner.policy.model, policy)
    constant_logits(learner.distillation.teacher.model, teacher)
    learner.optimiser = recorder = GradientRecorder(learner.policy)
    report = learner.update(groups, trainer.objective)
    assert report.loss == pytest.approx(COEF * value, rel=2e-6)
    assert report.kernel_metrics["teacher_divergence"] == pytest.approx(value, rel=2e-6)
    if slopes is None:
        p, t = (torch.tensor(z, dtype=F64).softmax(0) for z in (policy, teacher))
        slopes = (p - t).tolist()
    found = TEMPERATURE / COEF * recorder.found[0]["lm_head.weight"][:4, 0]
    assert found.tolist() == pytest.approx(slopes, abs=1e-6)


# --- in a run ---------------------------------------------------------------------------------------


def test_groups_of_equal_rewards_are_trained_too(distilling) -> None:
    trainer = distilling("reverse", rewards=True)
    group, *_ = collect(trainer)
    equal = Group(group.question, group.trajectories, (0.0,) * len(group.trajectories))
    report = trainer.learner.update([equal], trainer.objective)
    assert report.grad_norms[0] > 0
    assert report.tokens_trained == sum(t.num_tokens for t in group.trajectories)


def test_updates_bring_the_policy_to_its_teacher(distilling) -> None:
    trainer = distilling("reverse", train={"lr": 3e-3})
    groups = collect(trainer)
    found = [
        trainer.learner.update(groups, trainer.objective).kernel_metrics["teacher_divergence"]
        for _ in range(10)
    ]
    assert found[-1] < 0.8 * found[0]


def test_adapters_get_their_part_of_the_gradient(distilling, model_folder, teacher_folder) -> None:
    """For W + s B A with B = 0: dB = s dW A^T, dA = 0."""
    trainer = distilling("jsd", model={"lora": {"rank": 4, "alpha": 8.0}})
    groups, learner = collect(trainer), trainer.learner
    learner._backward(learner._batch_of(groups, trainer.objective))
    _, gradients = exact("jsd", groups, (model_folder, teacher_folder), rewards=False)
    ours = dict(learner.policy.model.named_parameters())
    checked = 0
    for name, parameter in ours.items():
        if ".lora_B." not in name:
            assert parameter.grad is None or not parameter.grad.any()
            continue
        layer = name.partition(".lora_B.")[0].removeprefix("base_model.model.") + ".weight"
        factor = ours[name.replace(".lora_B.", ".lora_A.")].double()
        expected = 2.0 * gradients[layer] @ factor.t()
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), expected, rtol=1e-4, atol=1e-7)
        checked += 1
    assert checked == len(trainable(learner.policy.model)) // 2 > 0


def test_released_gradients_end_at_the_same_weights(distilling) -> None:
    """Two backward passes over the loss and the divergence."""
    sections = {"train": {"max_tokens_per_microbatch": 4096, "minibatches": 1, "lr": 1e-3}}
    usual, released = (
        distilling("reverse", rewards=True, train=sections["train"] | {"gradient_release": flag})
        for flag in (False, True)
    )
    groups = collect(usual)
    norms = [t.learner.update(groups, t.objective).grad_norms[0] for t in (usual, released)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    theirs = dict(usual.learner.policy.model.named_parameters())
    for name, ours in released.learner.policy.model.named_parameters():
        torch.testing.assert_close(ours, theirs[name], rtol=0, atol=1e-7, msg=name)


def test_no_logits_are_whole(distilling, monkeypatch) -> None:
    trainer = distilling("reverse")
    groups, largest, into = collect(trainer), [], runtime.logits_into

    def watched(out: Tensor, hidden: Tensor, weight: Tensor) -> None:
        largest.append(len(out))
        into(out, hidden, weight)

    monkeypatch.setattr(runtime, "logits_into", watched)
    trainer.learner.policy.sizes.chunk_rows = 5
    trainer.learner.update(groups, trainer.objective)
    assert max(largest) == 5


def test_a_head_of_another_size_is_refused_before_weights_are_loaded(
    tokenizer, model_folder, tmp_path
) -> None:
    padded = make_model(tokenizer, seed=2, layers=1, width=64)
    padded.resize_token_embeddings(len(tokenizer) + 32)
    padded.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    distillation = {"teacher": str(tmp_path), "divergence": "reverse"}
    config = validate({"algorithm": {"distillation": distillation}})
    size = len(tokenizer)
    with pytest.raises(
        ConfigError, match=f"a head of {size + 32} tokens, model.name one of {size}"
    ):
        check_teacher(config, model_files(str(model_folder)))
    sampled = validate({"algorithm": {"distillation": {"teacher": str(tmp_path)}}})
    check_teacher(sampled, model_files(str(model_folder)))


def test_a_head_with_a_bias_is_refused(distilling, model_folder, teacher_folder) -> None:
    policy = distilling("reverse").learner.policy
    head = policy.model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(len(head.weight)))
    distillation = {"teacher": str(teacher_folder), "divergence": "jsd"}
    config = validate({"algorithm": {"distillation": distillation}})
    with pytest.raises(ConfigError, match=r"divergence jsd: the head of model\.name has a bias"):
        make_distillation(config, policy)


def test_truncated_rollouts_are_refused() -> None:
    sections = {
        "algorithm": {"distillation": {"teacher": "some/model", "divergence": "reverse"}},
        "rollout": {"top_k": 5},
    }
    with pytest.raises(ConfigError, match=r"divergence reverse compares whole .* top_k to 0"):
        validate(sections)
