"""From judged groups to changed weights: what must not depend on packing, and what must not move."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import make_questions, terms_of

from exgrpo_fast.core.types import Group, Trajectory, Verdict
from exgrpo_fast.model.packing import Ragged
from exgrpo_fast.training.batch import carries_gradient
from exgrpo_fast.training.collector import PhaseTimer
from exgrpo_fast.training.learner import split_evenly
from exgrpo_fast.training.optim.optimiser import Optimiser, UpdateOutcome
from exgrpo_fast.training.update_stats import MetricSums


class GradientRecorder(Optimiser):
    """In the optimiser's place: keeps the gradients and leaves the weights alone."""

    def __init__(self, policy) -> None:
        super().__init__(policy.trainable_parameters, lr=0.0)
        self.model = policy.model
        self.found: list[dict[str, torch.Tensor]] = []

    def step(self) -> UpdateOutcome:
        grads = {n: p.grad.clone() for n, p in self.model.named_parameters()}
        self.found.append(grads)
        self.model.zero_grad(set_to_none=True)
        return UpdateOutcome(0.0, 0.0, None)

    def discard(self) -> None:
        self.model.zero_grad(set_to_none=True)


def questions_of(tokenizer):
    return make_questions(tokenizer, [f"q{i}" for i in range(8)])


def collect(trainer) -> list[Group]:
    return list(trainer.collector.collect(1, PhaseTimer()).groups)


def with_rewards(trainer, group: Group, rewards: list[float]) -> Group:
    scored = [
        replace(t, verdict=Verdict(r)) for t, r in zip(group.trajectories, rewards, strict=True)
    ]
    return trainer.collector.advantages.apply(Group(group.question, tuple(scored)))


def weights(trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.learner.policy.model.named_parameters()}


def moments(trainer) -> dict[str, dict[str, torch.Tensor]]:
    found = trainer.learner.optimiser.state_dict()["moments"]
    return {k: {n: t.clone() for n, t in of_one.items()} for k, of_one in found.items()}


def assert_same(found: dict, expected: dict) -> None:
    """Bit for bit, in nested dicts."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# --- the loss -------------------------------------------------------------------------------------


def test_a_shared_prompt_changes_neither_loss_nor_gradients(tokenizer, make_test_trainer) -> None:
    """Groups of 8 in packs of everything, against one sequence in each pack."""
    trainer = make_test_trainer(
        questions_of(tokenizer),
        function="even_length",
        rollout={"group_size": 8},
        algorithm={"entropy_coef": 0.01},
    )
    groups, learner = collect(trainer), trainer.learner
    reports, gradients = [], []
    for limit in (10_000, 1):
        learner.policy.sizes.max_tokens_per_microbatch = limit
        learner.optimiser = GradientRecorder(learner.policy)
        reports.append(learner.update(groups, trainer.objective))
        gradients += learner.optimiser.found
    shared, alone = reports
    assert shared.losses == pytest.approx(alone.losses, rel=1e-6, abs=1e-9)
    for name, expected in gradients[1].items():
        assert (gradients[0][name] - expected).norm() <= 1e-6 * expected.norm(), name
    trained = [row for row in terms_of(trainer, groups) if carries_gradient(row, trainer.objective)]
    own = sum(len(row.trajectory.question.prompt_ids) for row in trained)
    read = sum(map(len, {row.trajectory.question.prompt_ids for row in trained}))
    assert own > 4 * read
    assert shared.sums.read_metrics() == {
        "padding_frac": 0.0,
        "prompt_tokens_shared_frac": pytest.approx(1 - read / own),
    }
    assert alone.sums.read_metrics() == {"padding_frac": 0.0, "prompt_tokens_shared_frac": 0.0}


@pytest.mark.parametrize("minibatches", [1, 2])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_packing_changes_neither_loss_nor_gradients(
    tokenizer, make_test_trainer, aggregation: str, minibatches: int
) -> None:
    trainer = make_test_trainer(
        questions_of(tokenizer),
        function="even_length",
        algorithm={"aggregation": aggregation, "entropy_coef": 0.01},
        train={"minibatches": minibatches, "max_tokens_per_microbatch": 256},
    )
    groups, learner = collect(trainer), trainer.learner
    reports, gradients = [], []
    for limit in (10_000, 60, 1):  # everything in one pack, several, one sequence each
        learner.policy.sizes.max_tokens_per_microbatch = limit
        learner.optimiser = GradientRecorder(learner.policy)
        reports.append(learner.update(groups, trainer.objective))
        gradients.append(learner.optimiser.found)
    for report, found in zip(reports[1:], gradients[1:], strict=True):
        assert report.losses == pytest.approx(reports[0].losses, abs=1e-7)
        assert report.tokens_trained == reports[0].tokens_trained > 0
        assert report.kernel_metrics == pytest.approx(reports[0].kernel_metrics, abs=1e-5)
        assert len(found) == minibatches
        for update, expected in zip(found, gradients[0], strict=True):
            for name, gradient in update.items():
                scale = float(expected[name].abs().max())
                assert torch.allclose(gradient, expected[name], atol=1e-5 * scale + 1e-9), name


LENGTHS = [1, 2, 3, 4]  # tokens of the four completions below; max_completion_tokens is 12


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", [1 / 10] * 4),
        ("sequence_mean", [1 / 4, 1 / 8, 1 / 12, 1 / 16]),
        ("constant", [1 / 48] * 4),
    ],
)
def test_aggregation_is_a_choice_of_weights(
    tokenizer, make_test_trainer, aggregation: str, expected: list[float]
) -> None:
    questions = questions_of(tokenizer)
    trainer = make_test_trainer(questions, algorithm={"aggregation": aggregation})
    members = [
        Trajectory(
            questions[0],
            torch.ones(length, dtype=torch.int64),
            torch.zeros(length),
            torch.zeros(length),
            truncated=length == 4,
            verdict=Verdict(float(length == 1)),
        )
        for length in LENGTHS
    ]
    group = Group(questions[0], tuple(members))
    rows = terms_of(trainer, [group])
    assert [row.weight for row in rows] == pytest.approx(expected)
    assert [row.advantage for row in rows] == [0.75, -0.25, -0.25, -0.25]
    masking = replace(trainer.learner.weights, mask_truncated=True)
    trainer.learner.weights = masking  # out of the loss, still in its denominators
    rows = terms_of(trainer, [group])
    assert [row.weight for row in rows] == pytest.approx([*expected[:3], 0.0])


def test_the_loss_on_policy_is_minus_the_weighted_advantages(tokenizer, make_test_trainer) -> None:
    trainer = make_test_trainer(
        questions_of(tokenizer), function="even_length", algorithm={"aggregation": "token_mean"}
    )
    groups = collect(trainer)
    rows = terms_of(trainer, groups)
    expected = -sum(row.weight * row.advantage * row.trajectory.num_tokens for row in rows)
    report = trainer.learner.update(groups, trainer.objective)
    assert report.loss == pytest.approx(expected, abs=1e-6) and abs(expected) > 1e-4
    kept = [row for row in rows if carries_gradient(row, trainer.objective)]
    assert report.tokens_trained == sum(row.trajectory.num_tokens for row in kept)
    assert report.kernel_metrics["num_trained"] == report.tokens_trained


def test_truncated_completions_are_not_trained_on(tokenizer, make_test_trainer) -> None:
    trainer = make_test_trainer(
        questions_of(tokenizer),
        function="even_length",
        algorithm={"overlong": {"mask_truncated": True}},
    )
    groups = [
        replace(g, trajectories=tuple(replace(t, truncated=i > 1) for i, t in enumerate(members)))
        for g in (with_rewards(trainer, g, [1.0, 0.0, 1.0, 0.0]) for g in collect(trainer))
        for members in (g.trajectories,)
    ]
    report = trainer.learner.update(groups, trainer.objective)
    assert report.tokens_trained == sum(t.num_tokens for g in groups for t in g.trajectories[:2])


# --- what does not move ---------------------------------------------------------------------------


def test_equal_rewards_move_neither_weights_nor_moments(tokenizer, make_test_trainer) -> None:
    trainer = make_test_trainer(questions_of(tokenizer), function="even_length")
    trainer.step()
    before, momentum = weights(trainer), moments(trainer)
    assert any(float(t.abs().sum()) for m in momentum.values() for t in m.values())
    groups = [with_rewards(trainer, group, [0.7] * 4) for group in collect(trainer)]
    report = trainer.learner.update(groups, trainer.objective)
    assert (report.skipped, report.losses) == ({"update_without_gradient": 1}, [])
    assert_same(weights(trainer), before)
    assert_same(moments(trainer), momentum)
    assert trainer.learner.optimiser.num_updates == 1


def test_a_nan_from_the_rollout_is_refused_and_counted(tokenizer, make_test_trainer) -> None:
    trainer = make_test_trainer(questions_of(tokenizer), function="even_length")
    trainer.step()
    before, momentum = weights(trainer), moments(trainer)
    groups = [with_rewards(trainer, group, [1.0, 0.0, 1.0, 0.0]) for group in collect(trainer)]
    first = groups[0].trajectories[0]
    broken = replace(first, behaviour_logprobs=first.behaviour_logprobs * float("nan"))
    groups[0] = replace(groups[0], trajectories=(broken, *groups[0].trajectories[1:]))
    report = trainer.learner.update(groups, trainer.objective)
    assert report.skipped == {"update_not_finite": 1}
    assert_same(weights(trainer), before)
    assert_same(moments(trainer), momentum)
    assert all(p.grad is None for p in trainer.learner.policy.trainable_parameters)


def test_a_gradient_far_too_large_is_refused_and_counted(tokenizer, make_test_trainer) -> None:
    trainer = make_test_trainer(
        questions_of(tokenizer), function="even_length", train={"skip_grad_norm": 1e-9}
    )
    before = weights(trainer)
    _, metrics = trainer.step()
    assert metrics["reasons"]["update_gradient_too_large"] == metrics["skipped"] == 1
    assert metrics["grad_norm"] > 1e-9
    assert_same(weights(trainer), before)
    assert moments(trainer) == {}


# --- the KL term ----------------------------------------------------------------------------------


def test_the_kl_term_is_taken_to_the_initial_policy(tokenizer, make_test_trainer) -> None:
    trainer = make_test_trainer(questions_of(tokenizer), algorithm={"kl": {"coef": 0.5}})
    learner = trainer.learner
    recorder = learner.optimiser = GradientRecorder(learner.policy)

    def report():
        equal = [with_rewards(trainer, group, [0.0] * 4) for group in collect(trainer)]
        return equal, learner.update(equal, trainer.objective)

    _, at_start = report()
    assert at_start.kernel_metrics["kl_ref"] == pytest.approx(0.0, abs=1e-6)
    assert at_start.tokens_trained > 0, "with a KL term no row is left out"

    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for p in learner.policy.trainable_parameters:
            p += 0.02 * torch.randn(p.shape, generator=generator)
    groups, moved = report()
    trajectories = [t for g in groups for t in g.trajectories]
    prompts = Ragged.of([t.question.prompt_ids for t in trajectories])
    asked = prompts, Ragged.of([t.token_ids for t in trajectories])
    now, then = learner.policy.score(*asked), learner.reference.base.score(*asked)
    d = (now.logprobs - then.logprobs).double()
    kl = (-d).exp() - 1 + d
    assert moved.kernel_metrics["kl_ref"] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert float(kl.mean()) > 1e-3
    weight = 1 / (len(trajectories) * 12)  # constant aggregation
    assert moved.loss == pytest.approx(0.5 * weight * float(kl.sum()), rel=1e-4)
    largest = [max(float(g.abs().max()) for g in found.values()) for found in recorder.found]
    assert largest[0] < 1e-3 * largest[1]
    assert all(p.grad is None for p in learner.reference.base.model.parameters())


# --- small parts ----------------------------------------------------------------------------------


def test_metrics_of_micro_batches_are_joined_by_the_rows_they_are_means_of() -> None:
    sums = MetricSums()
    first = {"num_trained": 10, "num_shaped": 4, "entropy_mean": 2.0, "shaped_mean": 0.5}
    second = {"num_trained": 30, "num_shaped": 0, "entropy_mean": 4.0, "shaped_mean": 0.0}
    clipped = ({"clip_fraction": 0.5, "ratio_max": 3.0}, {"clip_fraction": 0.1, "ratio_max": -1.0})
    for whole, more in zip((first, second), clipped, strict=True):
        sums.add(whole | more)
    assert sums.joined() == pytest.approx(
        {
            "num_trained": 40.0,
            "num_shaped": 4.0,
            "entropy_mean": (10 * 2 + 30 * 4) / 40,
            "shaped_mean": 0.5,  # 4 and 0 shaped rows
            "clip_fraction": (6 * 0.5 + 30 * 0.1) / 36,  # 6 and 30 fresh rows
            "ratio_max": 3.0,
        }
    )


def test_a_mean_over_no_rows_is_none() -> None:
    sums = MetricSums()
    names = {"num_trained": 3, "num_shaped": 0, "shaped_mean": 0.0, "entropy_mean": 1.0}
    sums.add(names)
    assert sums.joined()["shaped_mean"] is None and sums.joined()["entropy_mean"] == 1.0


def test_split_evenly() -> None:
    items: list[Any] = list(range(7))
    assert split_evenly(items, 3) == [[0, 3, 6], [1, 4], [2, 5]]
    assert split_evenly(items, 1) == [items]
    assert split_evenly(items[:2], 4) == [[0], [1]]
    assert split_evenly([], 3) == []
