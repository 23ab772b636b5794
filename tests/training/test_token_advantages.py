"""Advantages of single tokens: the numbers of the papers' formulas, and their way into an update."""

from __future__ import annotations

import copy
import math
import shutil
from dataclasses import replace

import pytest
import torch
from test_learner import collect, questions_of

from exgrpo_fast.build.folder import check_teacher
from exgrpo_fast.config import ConfigError, load_config, validate
from exgrpo_fast.model.folder_reading import model_files
from exgrpo_fast.training.advantages import quantile
from exgrpo_fast.training.reference import BehaviourReference
from exgrpo_fast.training.token_advantages import (
    clip_cov,
    covariances,
    distilled,
    entropy_shaped,
    highest_entropies,
    kl_cov,
)
from exgrpo_kernels import PolicyObjective, policy_loss

F64 = torch.float64


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


LOGPROBS = vector(-0.10, -1.20, -0.50, -2.30, -0.05, -3.00)
BEHAVIOUR = vector(-0.30, -1.00, -0.55, -1.60, -0.05, -3.40)
ADVANTAGES = vector(1.0, 1.0, 1.0, 1.0, -0.8, -0.8)
ENTROPIES = vector(0.30, 1.50, 0.80, 2.20, 0.10, 2.60)


def check_loss(
    advantages: torch.Tensor, loss: float, c1: list[float], *, clip_high: float, divide_by: int = 1
) -> None:
    """To eight digits, with a lower clip of 0.2."""
    leaf = LOGPROBS.clone().requires_grad_()
    result = policy_loss(
        leaf,
        advantages=advantages,
        behaviour_logprobs=BEHAVIOUR,
        weights=torch.full_like(leaf, 1 / divide_by),
        objective=PolicyObjective(clip_low=0.2, clip_high=clip_high),
    )
    (slopes,) = torch.autograd.grad(result.loss, leaf)
    assert result.loss.item() == pytest.approx(loss, abs=6e-9)
    assert slopes.tolist() == pytest.approx(c1, abs=6e-9)


# --- high-entropy tokens --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entropies", "share", "kept"),
    [
        ([0.01, 0.7, 0.02, 1.9, 0.0, 0.7, 0.3, 1.1], 0.2, [3, 7]),
        ([0.01, 0.7, 0.02, 1.9, 0.0, 0.7, 0.3, 1.1], 0.25, [3, 7]),
        ([0.01, 0.7, 0.02, 1.9, 0.0, 0.7, 0.3, 1.1], 0.3, [1, 3, 7]),  # of equal ones the first
        ([0.0, 0.0, 0.0, 0.0, 0.0, 0.5], 0.5, [0, 1, 5]),
        (ENTROPIES.tolist(), 0.2, [3, 5]),
        ([0.3] * 10, 0.3, [0, 1, 2]),  # 0.3 x 10 is 3, whatever its float says
        ([1.0], 0.01, [0]),
    ],
)
def test_the_share_of_highest_entropy_is_kept(entropies, share, kept) -> None:
    mask = highest_entropies(vector(*entropies), share)
    assert mask.nonzero().flatten().tolist() == kept


@pytest.mark.parametrize(
    ("divide_by", "loss", "c1"),
    [
        (6, 0.11614574, [0, 0, 0, -0.08276422, 0, 0.19890996]),  # all tokens, as TRL
        (2, 0.34843723, [0, 0, 0, -0.24829265, 0, 0.59672988]),  # the tokens kept, as the paper
    ],
)
def test_the_loss_of_high_entropy_tokens(divide_by, loss, c1) -> None:
    kept = highest_entropies(ENTROPIES, 0.2)
    check_loss(kept * ADVANTAGES, loss, c1, clip_high=0.28, divide_by=divide_by)


# --- entropy-shaped advantage ---------------------------------------------------------------------


def test_the_entropy_shaped_advantage() -> None:
    advantages = vector(1, 1, 1, 1, -0.8, 0)
    shaped = entropy_shaped(advantages, ENTROPIES, alpha=0.4, kappa=2.0)
    assert shaped.tolist() == pytest.approx([1.12, 1.5, 1.32, 1.5, -0.76, 0.0], abs=1e-12)
    c1 = [-1.36797109, -1.22809613, -1.38767785, -0.74487796, 0.76, 0.0]
    check_loss(shaped, -3.96862302, c1, clip_high=0.28)
    weaker = entropy_shaped(advantages, ENTROPIES, alpha=0.1, kappa=2.0)
    assert weaker.tolist() == pytest.approx([1.03, 1.15, 1.08, 1.22, -0.79, 0.0], abs=1e-12)


# --- quantile baseline ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "of_success", "of_failure"),
    [(1, 3.02371578, 0), (4, 2, 0), (5, 0, -2.06559112), (7, 0, -3.02371578)],
)
def test_the_quantile_baseline(successes, of_success, of_failure) -> None:
    found = quantile([1.0] * successes + [0.0] * (8 - successes), share=0.4)
    assert found[0] == pytest.approx(of_success, abs=6e-9)
    assert found[-1] == pytest.approx(of_failure, abs=6e-9)


def test_the_quantile_of_rewards_between_0_and_1() -> None:
    rewards = [0.1, 0.9, 0.4, 0.4, 0.7]
    mean = sum(rewards) / 5
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 5)
    expected = [-0.3, 0.5, 0.0, 0.0, 0.3]
    assert [a * std for a in quantile(rewards, share=0.4)] == pytest.approx(expected)
    assert [a * std for a in quantile(rewards, share=0.6)] == pytest.approx(expected)
    wider = quantile(rewards, share=0.4, std="sample")
    assert [a * std * math.sqrt(5 / 4) for a in wider] == pytest.approx(expected)
    assert quantile([0.1] * 3) == [0.0] * 3 and quantile([1.0], of=[1.0, 1.0]) == [0.0]
    assert quantile([1.0, 0.0], of=[0.0, 0.0, 0.0, 1.0]) == pytest.approx([2.30940108, 0.0])


# --- on-policy distillation -----------------------------------------------------------------------

TEACHER = vector(-0.60, -0.90, -0.52, -4.00, -0.20, -2.50)


@pytest.mark.parametrize(
    ("rewards", "advantages", "loss"),
    [
        (0.0, [-0.3, 0.1, 0.03, -2.4, -0.15, 0.9], 0.25217212),
        (1.0, [0.7, 1.1, 1.03, -1.4, -0.95, 0.1], -1.34235803),
    ],
)
def test_distillation(rewards, advantages, loss) -> None:
    found = distilled(rewards * ADVANTAGES, BEHAVIOUR, TEACHER, coef=1.0)
    assert found.tolist() == pytest.approx(advantages, abs=1e-12)
    result = policy_loss(
        LOGPROBS,
        advantages=found,
        behaviour_logprobs=BEHAVIOUR,
        weights=torch.ones(6),
        objective=PolicyObjective(clip_low=None, clip_high=None),
    )
    assert result.loss.item() == pytest.approx(loss, abs=6e-9)


def test_a_token_that_the_teacher_does_not_have_is_silent() -> None:
    found = distilled(vector(1.0, 1.0), vector(-1.0, -1.0), vector(-math.inf, -3.0), coef=0.5)
    assert found.tolist() == [0.0, 0.0 + 1.0 - 0.5 * 2.0]


# --- covariance -----------------------------------------------------------------------------------

COVARIANCES = [0.655, -0.005, 0.415, -0.665, -1.37, 2.17]


def test_covariances() -> None:
    assert covariances(ADVANTAGES, LOGPROBS).tolist() == pytest.approx(COVARIANCES, abs=1e-12)


def drawn(share: float, seed: int, clipped: list[int]) -> list[int]:
    mask = clip_cov(
        vector(*COVARIANCES),
        share=share,
        low=0.3,
        high=5.0,
        generator=torch.Generator().manual_seed(seed),
        clipped_N=torch.zeros(6, dtype=torch.bool).index_fill(0, torch.tensor(clipped), True),
    )
    return mask.nonzero().flatten().tolist()


def test_clip_cov_draws_among_the_eligible() -> None:
    assert {tuple(drawn(0.0002, seed, [0])) for seed in range(20)} == {(2,), (5,)}
    assert drawn(0.5, 0, [0]) == [2, 5]  # three are wanted, two are there
    assert drawn(0.5, 0, [0, 2, 5]) == []
    advantages = ADVANTAGES.clone()
    advantages[5] = 0.0
    c1 = [0.0, -0.81873075, -1.05127110, -0.49658530, 0.8, 0.0]
    check_loss(advantages, -2.76658715, c1, clip_high=0.2)


@pytest.mark.parametrize(("share", "picked"), [(0.0002, [5]), (1 / 3, [0, 5]), (1.0, [*range(6)])])
def test_kl_cov_picks_the_largest(share, picked) -> None:
    """What the loss makes of them: tests/kernels/test_objective_oracles.py."""
    assert kl_cov(vector(*COVARIANCES), share=share).nonzero().flatten().tolist() == picked


# --- in an update ---------------------------------------------------------------------------------


def columns_of(trainer, groups):
    """Every column of the update, packs joined."""
    batch = trainer.learner._batch_of(groups, trainer.objective)
    return [part.columns for part in batch.packs(trainer.learner.policy)]


def test_high_entropy_tokens_in_an_update(tokenizer, make_test_trainer) -> None:
    questions = questions_of(tokenizer)
    settings = {"aggregation": "token_mean"}
    plain = make_test_trainer(questions, function="even_length", algorithm=settings)
    groups = collect(plain)
    tokens = {"high_entropy_share": 0.25}
    ours = make_test_trainer(
        questions, function="even_length", algorithm=settings | {"tokens": tokens}
    )
    entropies = torch.cat([t.entropies for group in groups for t in group.trajectories])
    count = math.ceil(0.25 * len(entropies))
    threshold = entropies.sort(descending=True).values[count - 1]
    terms = ours.learner._batch_of(groups, ours.objective).terms
    found = {id(term.trajectory): term.advantages_T for term in terms}
    checked = 0
    for term in plain.learner._batch_of(groups, plain.objective).terms:
        kept = term.trajectory.entropies >= threshold
        expected = kept * term.advantage * len(entropies) / count
        own = found.get(id(term.trajectory), torch.zeros(term.trajectory.num_tokens))
        torch.testing.assert_close(own, expected)
        checked += int(kept.sum())
    assert checked > 0
    report = ours.learner.update(groups, ours.objective)
    assert report.loss != plain.learner.update(groups, plain.objective).loss


def test_entropy_shaping_and_clip_cov_in_an_update(tokenizer, make_test_trainer) -> None:
    tokens = {"entropy_shaping": 0.4, "clip_cov": 0.2, "clip_cov_range": [-100.0, 100.0]}
    trainer = make_test_trainer(
        questions_of(tokenizer), function="even_length", algorithm={"tokens": tokens}
    )
    groups = collect(trainer)
    terms = trainer.learner._batch_of(groups, trainer.objective).terms
    again = trainer.learner._batch_of(groups, trainer.objective).terms
    silent = total = 0
    for term, same in zip(terms, again, strict=True):
        assert torch.equal(term.advantages_T, same.advantages_T)  # the draw is seeded
        bonus = (0.4 * term.trajectory.entropies).clamp(max=abs(term.advantage) / 2)
        zero = term.advantages_T == 0
        torch.testing.assert_close(
            term.advantages_T, torch.where(zero, 0.0, term.advantage + bonus)
        )
        silent, total = silent + int(zero.sum()), total + len(zero)
    assert 0 < silent < total


def test_kl_cov_in_an_update(tokenizer, make_test_trainer) -> None:
    """Its term is 0 in the first update of a step and not in the second."""
    trainer = make_test_trainer(
        questions_of(tokenizer),
        function="even_length",
        algorithm={
            "clip_low": None,
            "clip_high": None,
            "tokens": {"kl_cov": 0.3},
            "kl": {"coef": 0.5, "estimator": "abs", "reference": "behaviour"},
        },
        train={"minibatches": 2},
    )
    assert isinstance(trainer.learner.reference, BehaviourReference)
    groups = trainer.learner.reference.score(collect(trainer))
    weights = torch.cat([c.kl_weights for c in columns_of(trainer, groups)])
    assert weights.sum() == int(0.3 * len(weights)) > 0 and set(weights.tolist()) == {0.0, 1.0}
    report = trainer.learner.update(groups, trainer.objective)
    assert report.kernel_metrics["kl_ref"] > 0


def test_distillation_in_an_update(tokenizer, make_test_trainer, model_folder) -> None:
    """The teacher is the initial policy: no gradient at first, and a pull back once it has moved."""
    algorithm = {
        "clip_low": None,
        "clip_high": None,
        "aggregation": "token_mean",
        "distillation": {"teacher": str(model_folder), "coef": 2.0, "rewards": False},
    }
    trainer = make_test_trainer(
        questions_of(tokenizer), function="even_length", algorithm=algorithm
    )
    groups = collect(trainer)
    for term in trainer.learner._batch_of(groups, trainer.objective).terms:
        assert term.advantages_T.abs().max() < 1e-5
    weight = trainer.learner.policy.model.get_output_embeddings().weight
    with torch.no_grad():
        weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    moved = collect(trainer)
    terms = trainer.learner._batch_of(moved, trainer.objective).terms
    (rule,) = trainer.learner.token_rules
    for term in terms:
        (teacher,) = rule.teacher_logprobs([term.trajectory])
        expected = 2.0 * (teacher - term.trajectory.behaviour_logprobs)
        torch.testing.assert_close(term.advantages_T, expected, rtol=1e-4, atol=1e-5)
    assert sum(len(group.trajectories) for group in moved) == len(terms)  # equal rewards too
    report = trainer.learner.update(moved, trainer.objective)
    assert report.grad_norms[0] > 0


def test_a_teacher_with_another_tokenizer_is_refused(tokenizer, model_folder, tmp_path) -> None:
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<another>"])
    other.save_pretrained(tmp_path)
    shutil.copy(model_folder / "config.json", tmp_path)
    config = validate({"algorithm": {"distillation": {"teacher": str(tmp_path)}}})
    with pytest.raises(ConfigError, match=r"distillation.teacher .* another tokenizer"):
        check_teacher(config, model_files(str(model_folder)))


def test_dppo_in_an_update(tokenizer, make_test_trainer) -> None:
    recipe = load_config("dppo").algorithm.model_dump()
    trainer = make_test_trainer(
        questions_of(tokenizer),
        function="even_length",
        algorithm=recipe | {"aggregation": "token_mean"},
    )
    groups = collect(trainer)
    report = trainer.learner.update(groups, trainer.objective)
    assert report.kernel_metrics["tv_frac"] == 0  # nothing has moved yet
    assert report.kernel_metrics["kl_ref"] == pytest.approx(0.0, abs=1e-10)
    moved = [
        replace(
            group,
            trajectories=tuple(
                replace(t, behaviour_logprobs=t.behaviour_logprobs - 1.0)
                for t in group.trajectories
            ),
        )
        for group in groups
    ]
    report = trainer.learner.update(moved, trainer.objective)
    assert report.kernel_metrics["kl_ref"] > 0.1


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"algorithm": {"tv_low": 0.2}}, ["tv_low", "algorithm.clip_low", "null"]),
        ({"algorithm": {"tv_low": 0.2, "surrogate": "sapo"}}, ["tv_low", "clip or cispo"]),
        ({"algorithm": {"tokens": {"kl_cov": 0.1}}}, ["kl_cov", "estimator abs"]),
        (
            {
                "algorithm": {
                    "tokens": {"kl_cov": 0.1},
                    "kl": {"coef": 1.0, "estimator": "abs", "reference": "behaviour"},
                },
                "train": {"minibatches": 1},
            },
            ["kl_cov", "train.minibatches 1"],
        ),
        (
            {"algorithm": {"tokens": {"clip_cov": 0.1, "clip_cov_range": [5.0, 1.0]}}},
            ["clip_cov_range", "[5, 1]"],
        ),
        (
            {"algorithm": {"kl": {"reference": "behaviour", "rebase_at_step": 3}}},
            ["rebase_at_step", "reference initial"],
        ),
        (
            {
                "algorithm": {"kl": {"coef": 0.1, "estimator": "k3_ratio"}},
                "replay": {"enabled": True, "weight": "proximal"},
            },
            ["proximal", "k3_ratio"],
        ),
        (
            {
                "algorithm": {"distillation": {"teacher": "some/model"}},
                "replay": {"weight": "proximal"},
            },
            ["algorithm.distillation", "proximal"],
        ),
        ({"algorithm": {"tokens": {"high_entropy_share": 0.0}}}, ["high_entropy_share"]),
    ],
)
def test_settings_that_do_not_fit_are_refused(sections, words) -> None:
    with pytest.raises(ConfigError) as error:
        validate(sections)
    assert all(word in str(error.value) for word in words), str(error.value)
