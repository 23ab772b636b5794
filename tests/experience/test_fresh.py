"""Fresh trajectories where the engine's log-probs are the policy's: what is scored, and what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import OwnEngine, make_questions, small_config
from torch import Tensor

from exgrpo_fast.build.engines import engine_scores
from exgrpo_fast.build.models import make_policy
from exgrpo_fast.core.types import Completion, Group, Trajectory
from exgrpo_fast.experience.fresh import FreshSource
from exgrpo_fast.model.policy import Policy, load_model
from exgrpo_fast.rollout.engine import UNOBSERVED, Observer, Request, Sampling
from exgrpo_fast.rollout.hf.engine import TransformersEngine
from exgrpo_fast.training.trainer import Trainer

COUNT = 40
PLAIN, TOP = Sampling(10), Sampling(10, 1.0, top_p=0.9, top_k=20)


class ShiftedEngine(OwnEngine):
    """Another engine's completions, with log-probs or entropies that are off by `by`."""

    def __init__(self, engine: TransformersEngine, column: str, by: float) -> None:
        self.engine, self.column, self.by = engine, column, by

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        observer: Observer = UNOBSERVED,
    ) -> list[Completion]:
        found = self.engine.generate(requests, sampling, observer)
        return [replace(c, **{self.column: getattr(c, self.column) + self.by}) for c in found]


@pytest.fixture
def policy(model_folder) -> Policy:
    policy = Policy(load_model(str(model_folder)))
    with torch.no_grad():
        policy.head.weight.mul_(20)  # far from the uniform distribution
    return policy


@pytest.fixture
def counted(policy, monkeypatch) -> list[int]:
    """Filled with the number of completions of every scoring pass."""
    found: list[int] = []
    score = Policy.score

    def counting(self: Policy, prompts: Any, completions: Any, **options: Any) -> Any:
        found.append(len(completions))
        return score(self, prompts, completions, **options)

    monkeypatch.setattr(Policy, "score", counting)
    return found


def engine_of(policy: Policy) -> TransformersEngine:
    return TransformersEngine(policy, eos_token_ids=[1], pad_token_id=0)


def scored(
    source: FreshSource, tokenizer: Any, step: int = 1
) -> tuple[list[Trajectory], list[Completion], Any]:
    question = make_questions(tokenizer, ["a"])[0]
    completions = source.start([question], [COUNT], step=step).wait()
    trajectories, mismatch = source.score([question] * COUNT, completions, step=step)
    return trajectories, completions, mismatch


def gap(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return float((torch.cat(list(ours)) - torch.cat(list(theirs))).abs().max())


@pytest.mark.parametrize("sampling", [PLAIN, TOP])
def test_the_engines_logprobs_and_entropies_are_the_policys(
    policy, tokenizer, counted, sampling
) -> None:
    """Over the whole vocabulary, and over the set that each token was drawn from."""
    quick = FreshSource(engine_of(policy), policy, sampling=sampling, seed=0, engine_scores=True)
    slow = FreshSource(engine_of(policy), policy, sampling=sampling, seed=0)
    found, completions, mismatch = scored(quick, tokenizer)
    expected, others, whole = scored(slow, tokenizer)
    assert all(c.entropies is None for c in others)
    assert [c.token_ids.tolist() for c in completions] == [c.token_ids.tolist() for c in others]
    assert counted == [3, COUNT]
    assert mismatch.scored_frac == 3 / COUNT and whole.scored_frac == 1.0
    for column in ("behaviour_logprobs", "entropies"):
        ours, theirs = ([getattr(t, column) for t in of] for of in (found, expected))
        assert max(float(x.abs().max()) for x in theirs) > 0.5
        assert gap(ours, theirs) < 1e-5


def test_another_sample_is_scored_in_each_step(policy) -> None:
    source = FreshSource(engine_of(policy), policy, sampling=PLAIN, seed=0, engine_scores=True)
    one = Completion(torch.zeros(1), torch.zeros(1), True, entropies=torch.zeros(1))
    asked = [(40, 0), (40, 1), (40, 17), (3, 4), (1, 5), (0, 1)]
    seen = [list(source._sample([one] * count, step)) for count, step in asked]
    assert seen == [[0, 16, 32], [1, 17, 33], [1, 17, 33], [1], [0], []]


@pytest.mark.parametrize("column", ["logprobs", "entropies"])
@pytest.mark.parametrize(
    ("by", "passes"), [(1e-5, [3]), (1e-4, [3, COUNT]), (float("nan"), [3, COUNT])]
)
def test_a_sample_that_disagrees_has_all_scored(
    policy, tokenizer, counted, column: str, by: float, passes: list[int]
) -> None:
    engine = ShiftedEngine(engine_of(policy), column, by)
    source = FreshSource(engine, policy, sampling=PLAIN, seed=0, engine_scores=True)
    trajectories, completions, mismatch = scored(source, tokenizer)
    assert counted == passes
    assert mismatch.scored_frac == passes[-1] / COUNT
    if len(passes) == 2:
        assert all(t.behaviour_logprobs.isfinite().all() for t in trajectories)
        assert all(t.entropies.isfinite().all() for t in trajectories)


def test_an_engine_without_entropies_has_all_scored(policy, tokenizer, counted) -> None:
    class Without(ShiftedEngine):
        def generate(self, requests: Any, sampling: Any, observer: Any = UNOBSERVED) -> Any:
            return self.engine.generate(requests, replace(sampling, entropies=False), observer)

    engine = Without(engine_of(policy), "", 0.0)
    source = FreshSource(engine, policy, sampling=PLAIN, seed=0, engine_scores=True)
    scored(source, tokenizer)
    assert counted == [COUNT]


# --- the update that follows ----------------------------------------------------------------------


def gradient(trainer: Trainer, groups: Sequence[Group]) -> Tensor:
    trainer.learner._backward(trainer.learner._batch_of(groups, trainer.objective))
    flat = torch.cat(
        [
            p.grad.flatten()
            for p in trainer.learner.policy.trainable_parameters
            if p.grad is not None
        ]
    )
    trainer.learner.optimiser.discard()
    return flat


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_the_gradient_is_that_after_a_scoring_pass(
    make_test_trainer, tokenizer, ratio_level: str
) -> None:
    questions = make_questions(tokenizer, ["a", "b", "c", "d"])
    algorithm = {"ratio_level": ratio_level}
    quick = make_test_trainer(questions, algorithm=algorithm)
    slow = make_test_trainer(questions, algorithm=algorithm, rollout={"scoring": "always"})
    groups = []
    for source in (quick.collector.fresh, slow.collector.fresh):
        completions = source.start(questions, [4] * 4, step=1).wait()
        fresh, _ = source.score([q for q in questions for _ in range(4)], completions, step=1)
        groups.append(
            [
                Group(question, tuple(fresh[4 * i : 4 * i + 4]), (1.0, -1.0, 0.5, -0.5))
                for i, question in enumerate(questions)
            ]
        )
    ours, theirs = (gradient(quick, of) for of in groups)
    assert theirs.norm() > 1e-3
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-6


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, True),
        ({"rollout": {"scoring": "always"}}, False),
        ({"rollout": {"top_k": 8}}, True),
        ({"model": {"dtype": "bfloat16"}}, False),
        ({"train": {"allow_mismatch": True}}, False),
        ({"algorithm": {"kl": {"coef": 0.1}}}, True),
        ({"algorithm": {"kl": {"coef": 0.1, "estimator": "abs", "reference": "behaviour"}}}, False),
    ],
)
def test_when_the_engine_scores(model_folder, sections, expected: bool) -> None:
    config = small_config(model_folder, "right", sections)
    policy = make_policy(config, str(model_folder), device="cpu")
    assert engine_scores(config, policy) is expected
