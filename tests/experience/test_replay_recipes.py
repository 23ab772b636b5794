"""Every replay recipe through the real trainer: its groups, its columns, and its loss against the
formula of its paper, computed from full logits in float64."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import ScriptedEngine, make_questions

from exgrpo_fast.config import load_config
from exgrpo_fast.core.types import Trajectory
from exgrpo_fast.experience.replay.snapshot import snapshot
from exgrpo_fast.experience.replay.source import ReplaySource
from exgrpo_fast.experience.replay.starting_pool import export_pool
from exgrpo_fast.run.checkpoint.format import load_state
from exgrpo_fast.training.trainer import Trainer

NAMES = [f"q{i}" for i in range(8)]


def sections(recipe: str, **replay: Any) -> dict[str, dict[str, Any]]:
    """The parts of a bundled recipe that make the method, with some of its numbers scaled down."""
    tree = load_config(recipe).model_dump(mode="json")
    store = tree["replay"]["store"] | replay.pop("store", {})
    tree["algorithm"]["overlong"] = {}
    return {
        "algorithm": tree["algorithm"],
        "replay": tree["replay"] | {"store": store} | replay,
        "train": {"lr": 3e-2, "minibatches": 1},
    }


def source(trainer: Trainer) -> ReplaySource:
    assert isinstance(trainer.replay, ReplaySource)
    return trainer.replay


def log_probs(model: Any, t: Trajectory) -> torch.Tensor:
    """float64 [T], one sequence at a time, from full logits."""
    ids = torch.tensor([[*t.question.prompt_ids, *t.token_ids.tolist()]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(t.question.prompt_ids) - 1 : -1].double()
    return logits.log_softmax(-1).gather(1, t.token_ids[:, None])[:, 0]


def step_with_start_model(trainer: Trainer):
    """(model before the step, batch, metrics)."""
    model = copy.deepcopy(trainer.learner.policy.model).eval()
    model.set_attn_implementation("eager")
    batch, metrics = trainer.step()
    return model, batch, metrics


def standardised(rewards: list[float]) -> list[float]:
    std = statistics.pstdev(rewards) if rewards else 0.0
    return [(r - statistics.fmean(rewards)) / std if std else 0.0 for r in rewards]


def centred(rewards: list[float]) -> list[float]:
    return [r - statistics.fmean(rewards) for r in rewards]


def expected_loss(
    model: Any,
    batch: Any,
    *,
    term: Callable[[torch.Tensor, Trajectory], torch.Tensor],
    advantages: Callable[[Any], list[float]],
    weight: Callable[[Trajectory], float],
) -> float:
    """-sum over tokens of weight x A x term(now / stored) for replayed, 1 for fresh ones: at the
    weights of the step's start the ratio of a fresh token is 1."""
    total = 0.0
    for group in batch.groups:
        for t, advantage in zip(group.trajectories, advantages(group), strict=True):
            if t.source == "replay":
                ratio = (log_probs(model, t) - t.behaviour_logprobs.double()).exp()
                total -= weight(t) * float((advantage * term(ratio, t)).sum())
            else:
                total -= weight(t) * advantage * t.num_tokens
    return total


def test_luffy_puts_the_expert_beside_fresh_ones(tokenizer, make_test_trainer) -> None:
    """Eq. 7 of arXiv 2504.14945: pi / (pi + 0.1), no clip, pooled baseline without std."""
    questions = [
        replace(q, columns={"solution": "right 3" if q.id < "q6" else None})
        for q in make_questions(tokenizer, NAMES)
    ]
    trainer = make_test_trainer(questions, function="even_length", **sections("luffy"))
    compared = 0
    for _ in range(3):
        model, batch, metrics = step_with_start_model(trainer)
        for group in batch.groups:
            experts = group.from_source("replay")
            assert len(experts) == (group.question.id < "q6") and len(group.trajectories) == 4
            for t in experts:
                assert t.token_ids.tolist() == tokenizer("right 3<|end|>")["input_ids"]
                assert not t.behaviour_logprobs.any() and t.shaping == 0.1
                compared += 1
        assert metrics["loss"] == pytest.approx(
            expected_loss(
                model,
                batch,
                term=lambda ratio, t: ratio / (ratio + 0.1),
                advantages=lambda group: centred(group.rewards),
                weight=lambda t: 1 / (4 * 4 * 12),
            ),
            rel=1e-4,
            abs=1e-7,
        )
    assert compared >= 6
    assert trainer.replay.objective(trainer.objective).clip_high is None


def test_repo_adds_an_objective_of_its_own(tokenizer, make_test_trainer) -> None:
    """Eqs. 3-6 of arXiv 2506.09340: J_fresh + coef J_replayed, both clipped, split advantages."""
    recipe = sections("repo", count=3, min_stored=4, coef=0.5, store={"max_per_question": 8})
    trainer = make_test_trainer(
        make_questions(tokenizer, NAMES[:4]), function="even_length", **recipe
    )
    seen = 0
    for step in range(4):
        model, batch, metrics = step_with_start_model(trainer)
        for group in batch.groups:
            replayed = group.from_source("replay")
            assert len(replayed) == (3 if step else 0) and len(group.from_source("fresh")) == 4
            seen += len(replayed)

        def split(group) -> list[float]:
            stored = iter(standardised([t.reward for t in group.from_source("replay")]))
            fresh = iter(standardised([t.reward for t in group.from_source("fresh")]))
            return [next(stored if t.source == "replay" else fresh) for t in group.trajectories]

        def clipped(ratio, t, batch=batch) -> torch.Tensor:
            group = next(g for g in batch.groups if any(t is member for member in g.trajectories))
            sign = split(group)[[m is t for m in group.trajectories].index(True)]
            bounded = ratio.clamp(0.8, 1.2)
            return torch.minimum(ratio, bounded) if sign > 0 else torch.maximum(ratio, bounded)

        def weight(t: Trajectory) -> float:
            return (0.5 / 12 if t.source == "replay" else 1 / 16) / t.num_tokens

        expected = expected_loss(model, batch, term=clipped, advantages=split, weight=weight)
        assert metrics["loss"] == pytest.approx(expected, rel=2e-4, abs=1e-7)
    assert seen == 36
    counts = source(trainer).store.num_rows_of_question().tolist()
    assert counts == [8] * 4  # 16 came for each, the last 8 stayed


def test_repo_takes_the_highest_rewards_and_the_newest_stay(tokenizer, make_test_trainer) -> None:
    questions = make_questions(tokenizer, NAMES[:2])
    engine = ScriptedEngine(tokenizer, questions)
    recipe = sections("repo", count=2, min_stored=4, store={"max_per_question": 4})
    trainer = make_test_trainer(
        questions, engine=engine, rollout={"prompts_per_step": 2, "group_size": 4}, **recipe
    )
    for question in questions:
        engine.expect(question.id, "wrong", "right 1", "wrong", "right 2")
        engine.expect(question.id, "wrong", "wrong", "wrong", "right 3")
        engine.expect(question.id, "wrong", "wrong", "wrong", "wrong")
    decode = trainer.collector.verifier.decode
    trainer.step()
    batch, _ = trainer.step()
    for group in batch.groups:
        assert [decode(t.token_ids.tolist()) for t in group.from_source("replay")] == [
            "right 1",
            "right 2",
        ]
    batch, _ = trainer.step()  # the first four have left for the second four
    for group in batch.groups:
        assert [decode(t.token_ids.tolist()) for t in group.from_source("replay")] == [
            "right 3",
            "wrong",
        ]


def test_rlep_replays_an_earlier_runs_successes(tokenizer, make_test_trainer, tmp_path) -> None:
    """arXiv 2507.07451: pooled standardised advantages over G + M, token mean, and denominators
    of the present weights, so that every ratio starts at 1."""
    questions = make_questions(tokenizer, NAMES)
    earlier = make_test_trainer(
        questions, function="even_length", replay={"enabled": True, "start_success_rate": None}
    )
    for _ in range(4):
        earlier.step()
    store = source(earlier).store
    path = tmp_path / "pool.parquet"
    kept = snapshot(store, NAMES, vocabulary=source(earlier).vocabulary)
    assert export_pool(kept, path, earlier.collector.verifier.decode) == store.num_trajectories > 4
    behind = {
        tuple(tokens.tolist()) for tokens in kept["token_ids"].split(kept["lengths"].tolist())
    }

    recipe = sections("rlep", store={"pool": str(path)})
    trainer = make_test_trainer(questions, function="even_length", **recipe)
    replayed = 0
    for _ in range(2):
        _, batch, metrics = step_with_start_model(trainer)
        tokens = sum(t.num_tokens for g in batch.groups for t in g.trajectories)
        expected = 0.0
        for group in batch.groups:
            stored = group.from_source("replay")
            assert len(stored) <= 2 and len(group.from_source("fresh")) == 4
            assert all(tuple(t.token_ids.tolist()) in behind for t in stored)
            replayed += len(stored)
            for t, a in zip(group.trajectories, standardised(group.rewards), strict=True):
                expected -= a * t.num_tokens / tokens
        assert metrics["loss"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
        if metrics["replay_ratio_mean"] is not None:
            assert metrics["replay_ratio_mean"] == pytest.approx(1.0, abs=1e-4)
    assert replayed >= 4
    assert source(trainer).store.num_trajectories == store.num_trajectories  # nothing is added


def test_remix_mixes_whole_groups_of_the_last_steps(tokenizer, make_test_trainer) -> None:
    """arXiv 2507.06892, eq. 3: at the start of a step the term of an old token is v A, with
    v = pi_start / pi_stored, and inside the clip that moves with it."""
    recipe = sections("remix", experience_ratio=0.5, stop_after_steps=5)
    kl = {"coef": 0.1, "estimator": "k2", "previous_share": 0.5, "rebase_at_step": 5}
    recipe["algorithm"]["kl"] = kl
    trainer = make_test_trainer(make_questions(tokenizer, NAMES), function="even_length", **recipe)
    models = [copy.deepcopy(trainer.learner.policy.model).eval()]  # after so many steps
    for step in range(1, 8):
        model, batch, metrics = step_with_start_model(trainer)
        old = [group for group in batch.groups if all(group.replayed)]
        assert len(batch.groups) == 4
        assert len(old) == (2 if 2 <= step <= 5 else 0)
        for group in old:
            assert len(group.trajectories) == 4
            (birth,) = {t.birth_step for t in group.trajectories}
            assert step - 2 <= birth < step
        expected = expected_loss(
            model,
            batch,
            term=lambda ratio, t: ratio,
            advantages=lambda group: standardised(group.rewards),
            weight=lambda t: 1 / 16 / t.num_tokens,
        )
        expected += 0.1 * kl_to(
            models[0 if step <= 5 else 5], models[max(step - 2, 0)], model, batch
        )
        assert metrics["loss"] == pytest.approx(expected, rel=2e-4, abs=1e-6)
        models.append(copy.deepcopy(trainer.learner.policy.model).eval())
    assert not trainer.replay.active


def assert_resumes_bit_for_bit(recipe, tokenizer, make_test_trainer) -> None:
    """Three steps, a checkpoint, and three more: the same losses from the checkpoint on."""
    questions = make_questions(tokenizer, NAMES)
    whole = make_test_trainer(questions, function="even_length", **recipe)
    for _ in range(3):
        whole.step()
    path = whole.save()
    expected = [whole.step()[1]["loss_hex"] for _ in range(3)]

    resumed = make_test_trainer(questions, function="even_length", **recipe)
    policy = resumed.learner.policy
    policy.model.load_state_dict(type(policy.model).from_pretrained(path / "hf").state_dict())
    resumed.load_state_dict(load_state(path))
    assert [resumed.step()[1]["loss_hex"] for _ in range(3)] == expected


def test_remix_resumes_bit_for_bit_with_its_frozen_policies(tokenizer, make_test_trainer) -> None:
    recipe = sections("remix", stop_after_steps=5)
    recipe["algorithm"]["kl"] |= {"coef": 0.1, "rebase_at_step": 2}
    assert_resumes_bit_for_bit(recipe, tokenizer, make_test_trainer)


def kl_to(base: Any, previous: Any, now: Any, batch: Any) -> float:
    """Mean over the batch of 1/2 (log pi - mixture)^2, k2, half of it to each frozen policy."""
    total = 0.0
    for t in (t for group in batch.groups for t in group.trajectories):
        mixed = 0.5 * log_probs(base, t) + 0.5 * log_probs(previous, t)
        total += float((0.5 * (log_probs(now, t) - mixed) ** 2).mean()) / 16
    return total


def test_replay_groups_exchanges_groups_without_a_gradient(tokenizer, make_test_trainer) -> None:
    """Stored groups come in proportion to sum |A| x std, with their own log-probs and rewards."""
    questions = make_questions(tokenizer, NAMES[:4])
    engine = ScriptedEngine(tokenizer, questions)
    recipe = sections("replay-groups", store={"max_groups": 2})
    trainer = make_test_trainer(questions, engine=engine, **recipe)
    mixed = {"q0": "1000", "q1": "1100", "q2": "1110", "q3": "0000"}

    def lines(outcome: str) -> list[str]:
        return [f"right {i}" if c == "1" else f"wrong {i}" for i, c in enumerate(outcome)]

    for name, outcome in mixed.items():
        engine.expect(name, *lines(outcome))
    batch, _ = trainer.step()
    assert not any(any(group.replayed) for group in batch.groups)  # nothing was stored yet
    first = {g.question.id: g for g in batch.groups}
    store = source(trainer).store
    kept = {NAMES[i] for i in store.rows["question"][store.rows["question"] >= 0].tolist()}
    assert "q1" in kept and "q3" not in kept and len(kept) == 2  # 2.0, then 1.5 twice, then 0

    draws = [source(trainer)._draw_groups(1, by_score=True)[0].question.id for _ in range(400)]
    assert draws.count("q1") / 400 == pytest.approx(2.0 / 3.5, abs=0.08)  # 3 standard deviations

    for name in mixed:
        engine.expect(name, *lines("0000"))
    batch, metrics = trainer.step()
    stored = [g for g in batch.groups if all(g.replayed)]
    assert {g.question.id for g in stored} == kept and len(batch.groups) == 4
    for group in stored:
        origin = first[group.question.id]
        assert group.rewards == origin.rewards
        for now, then in zip(group.trajectories, origin.trajectories, strict=True):
            assert torch.equal(now.token_ids, then.token_ids)
            assert torch.equal(now.behaviour_logprobs, then.behaviour_logprobs)
            assert now.birth_step == 1
    assert metrics["learnable_frac"] == 0.5
    assert metrics["replay_ratio_max"] > 1.0 or metrics["replay_ratio_mean"] != 1.0


def test_questions_only_asks_again_and_replays_nothing(tokenizer, make_test_trainer) -> None:
    recipe = sections("exgrpo-questions-only", start_success_rate=None)
    trainer = make_test_trainer(make_questions(tokenizer, NAMES), function="even_length", **recipe)
    asked_again = 0
    for step in range(6):
        stored = {NAMES[i] for i in (source(trainer).store.bucket >= 0).nonzero().flatten()}
        again = [q.id for q in copy.deepcopy(source(trainer)).prepare(step + 1).again]
        assert set(again) <= stored and len(again) == min(2, len(stored))
        batch, metrics = trainer.step()
        assert [g.question.id for g in batch.groups[: len(again)]] == again
        assert all(len(g.trajectories) == 4 and not any(g.replayed) for g in batch.groups)
        assert metrics["replay_frac"] == 0.0
        asked_again += len(again)
    assert asked_again >= 6
    assert trainer.replay.objective(trainer.objective).clip_high == 0.2


def test_prompt_replay_asks_medium_questions_after_a_rest(tokenizer, make_test_trainer) -> None:
    questions = make_questions(tokenizer, NAMES)
    engine = ScriptedEngine(tokenizer, questions)
    recipe = sections("prompt-replay", cooldown_steps=1, max_visits=2)
    trainer = make_test_trainer(questions, engine=engine, **recipe)
    outcome = {"q0": "1000", "q1": "1100", "q2": "1111", "q3": "0000"}
    outcome |= {"q4": "1110", "q5": "0100", "q6": "0001", "q7": "1110"}
    for _ in range(12):
        for name in NAMES:
            engine.expect(name, *[f"right {c}" if c == "1" else "wrong" for c in outcome[name]])
    visits: dict[str, list[int]] = {name: [] for name in NAMES}
    for step in range(1, 9):
        store = source(trainer).store
        before = {n: (int(store.visits[i]), list(visits[n])) for i, n in enumerate(NAMES)}
        again = [q.id for q in copy.deepcopy(source(trainer)).prepare(step).again]
        for name in again:
            count, steps = before[name]
            assert outcome[name] not in ("1111", "0000")
            assert count < 2 and steps[-1] + 1 < step
        if "q1" in again:
            assert again[0] == "q1"  # exactly one half comes first
        batch, _ = trainer.step()
        for group in batch.groups:
            visits[group.question.id].append(step)
    assert store.num_trajectories == 0


def test_continuous_rewards_are_bucketed_by_their_spread(tokenizer, make_test_trainer) -> None:
    """ExGRPO section 5.3: no full marks, so the spread in the group says how hard a question is."""
    trainer = make_test_trainer(
        make_questions(tokenizer, NAMES),
        function="length_reward",
        replay={
            "enabled": True,
            "start_success_rate": None,
            "difficulty": "reward_std",
            "retire": False,
        },
    )
    for _ in range(3):
        batch, metrics = trainer.step()
        stds = [statistics.pstdev(g.rewards) for g in batch.groups]
        low, high = min(stds), max(stds)
        for group, std in zip(batch.groups, stds, strict=True):
            place = source(trainer).place_of[group.question.id]
            wanted = round((std - low) / (high - low) * 4)
            assert int(source(trainer).store.bucket[place]) == wanted
    assert len(metrics["replay_buckets"]) == 5 and metrics["replay_size"] > 4
    rows = source(trainer).store.rows
    assert float(rows["reward"][rows["question"] >= 0].min()) > 0.0


def step_with_update(trainer: Trainer, monkeypatch: pytest.MonkeyPatch):
    """(model before the step, batch, the groups that the update trains on, metrics)."""
    seen: list[Any] = []
    update = trainer.learner.update
    with monkeypatch.context() as patch:
        patch.setattr(
            trainer.learner,
            "update",
            lambda groups, *rest: (seen.append(groups), update(groups, *rest))[1],
        )
        model, batch, metrics = step_with_start_model(trainer)
    return model, batch, seen[0], metrics


def test_fifo_draws_single_rollouts_with_the_advantage_of_their_birth(
    tokenizer, make_test_trainer, monkeypatch
) -> None:
    """arXiv 2604.08706: B = ratio x R of the N newest rollouts, correct or not, whatever their age;
    clipped r = pi / pi_generation, and the advantage that their group of then gave them."""
    recipe = sections("fifo", replay_ratio=1.5, store={"max_trajectories": 40})
    trainer = make_test_trainer(make_questions(tokenizer, NAMES), function="even_length", **recipe)
    of_birth: dict[tuple[int, bytes, bytes], set[float]] = {}
    replayed = 0
    for step in range(1, 6):
        model, batch, drawn, metrics = step_with_update(trainer, monkeypatch)
        for group in batch.groups:
            assert group.advantages == pytest.approx(standardised(group.rewards))
            for t, advantage in zip(group.trajectories, group.advantages, strict=True):
                key = step, t.token_ids.numpy().tobytes(), t.behaviour_logprobs.numpy().tobytes()
                of_birth.setdefault(key, set()).add(float(torch.tensor(advantage)))
        assert source(trainer).store.num_trajectories == min(16 * step, 40)
        assert len(drawn) == min(16 * step, 24) and all(len(g.trajectories) == 1 for g in drawn)
        for group in drawn:
            (t,) = group.trajectories
            key = (
                t.birth_step, t.token_ids.numpy().tobytes(), t.behaviour_logprobs.numpy().tobytes(),
            )  # fmt: skip
            assert group.advantages[0] in of_birth[key]
            assert t.source == ("fresh" if t.birth_step == step else "replay")
            assert step - t.birth_step <= 2  # 40 hold two steps and a half
        count = len(drawn)
        old = [g for g in drawn if g.trajectories[0].source == "replay"]
        replayed += len(old)
        assert metrics["replay_frac"] == len(old) / len(drawn)

        def clipped(ratio, t, drawn=drawn) -> torch.Tensor:
            (sign,) = next(g.advantages for g in drawn if g.trajectories[0] is t)
            bounded = ratio.clamp(0.8, 1.2)
            return torch.minimum(ratio, bounded) if sign > 0 else torch.maximum(ratio, bounded)

        expected = expected_loss(
            model,
            replace(batch, groups=tuple(drawn)),
            term=clipped,
            advantages=lambda group: list(group.advantages),
            weight=lambda t, count=count: 1 / count / t.num_tokens,
        )
        assert metrics["loss"] == pytest.approx(expected, rel=2e-4, abs=1e-6)
    assert replayed >= 40


def test_fifo_draws_uniformly_and_removes_nothing(tokenizer, make_test_trainer) -> None:
    recipe = sections("fifo", store={"max_trajectories": 20})
    trainer = make_test_trainer(make_questions(tokenizer, NAMES), function="even_length", **recipe)
    for _ in range(2):
        trainer.step()
    replay = source(trainer)
    counts: dict[int, int] = {1: 0, 2: 0}
    for _ in range(300):
        drawn = replay._draw_singly(5, step=2)
        assert len({id(g) for g in drawn}) == 5
        for group in drawn:
            counts[group.trajectories[0].birth_step] += 1
    # 4 of 20 are of the first step; 3 standard deviations
    assert counts[1] / 1500 == pytest.approx(0.2, abs=0.03)
    assert replay.store.num_trajectories == 20


def test_fifo_resumes_bit_for_bit(tokenizer, make_test_trainer) -> None:
    recipe = sections("fifo", replay_ratio=1.5, store={"max_trajectories": 40})
    assert_resumes_bit_for_bit(recipe, tokenizer, make_test_trainer)
