"""The way from a plan to judged groups: dynamic sampling, overlong completions, broken rewards."""

from __future__ import annotations

import pytest
from conftest import ScriptedEngine, make_questions

from exgrpo_fast.training.collector import OverlongRule, PhaseTimer


def dynamic(extra: int) -> dict:
    return {
        "prompts_per_step": 4,
        "group_size": 2,
        "max_completion_tokens": 12,
        "dynamic_sampling": {"enabled": True, "max_extra_batches": extra},
    }


def scripted(tokenizer, make_test_trainer, names: str, scripts: dict[str, str], **sections):
    """scripts: question -> '10' for right, wrong."""
    questions = make_questions(tokenizer, list(names))
    engine = ScriptedEngine(tokenizer, questions)
    for name, outcome in scripts.items():
        engine.expect(name, *(f"right {i}" if c == "1" else "wrong" for i, c in enumerate(outcome)))
    return make_test_trainer(questions, engine=engine, **sections), engine


def ids(groups) -> set[str]:
    return {group.question.id for group in groups}


# --- dynamic sampling -----------------------------------------------------------------------------


def test_groups_without_a_gradient_make_room_for_others(tokenizer, make_test_trainer) -> None:
    learnable = set("bdfh")
    scripts = {name: "10" if name in learnable else "00" for name in "abcdefgh"}
    trainer, engine = scripted(
        tokenizer, make_test_trainer, "abcdefgh", scripts, rollout=dynamic(extra=7)
    )
    batch = trainer.collector.collect(1, PhaseTimer())
    assert ids(batch.groups) == learnable
    assert ids(batch.discarded) <= set("aceg") and all(not g.learnable for g in batch.discarded)
    asked = {name for name, lines in engine.lines.items() if not lines}
    assert asked == ids(batch.generated), "no question is asked twice"
    assert batch.generated == batch.groups + batch.discarded


@pytest.mark.parametrize("extra", [0, 1, 2])
def test_refilling_is_bounded(tokenizer, make_test_trainer, extra: int) -> None:
    names = "abcdefghijklmnop"
    trainer, _ = scripted(
        tokenizer, make_test_trainer, names, dict.fromkeys(names, "11"), rollout=dynamic(extra)
    )
    batch = trainer.collector.collect(1, PhaseTimer())
    assert (len(batch.groups), len(batch.discarded)) == (0, 4 * (1 + extra))


def test_a_full_step_is_not_refilled(tokenizer, make_test_trainer) -> None:
    trainer, _ = scripted(
        tokenizer, make_test_trainer, "abcdef", dict.fromkeys("abcdef", "10"), rollout=dynamic(5)
    )
    batch = trainer.collector.collect(1, PhaseTimer())
    assert (len(batch.groups), batch.discarded) == (4, ())


@pytest.mark.parametrize("function", ["always", "never"])
def test_constant_rewards_end_and_are_reported(tokenizer, make_test_trainer, function: str) -> None:
    """Four questions, all asked at once: there is nothing to refill from, with the real engine."""
    trainer = make_test_trainer(
        make_questions(tokenizer, list("abcd")), function=function, rollout=dynamic(extra=3)
    )
    trainer.max_steps = 2
    trainer.train()
    assert trainer.num_steps == 2
    _, metrics = trainer.step()
    assert (metrics["learnable_frac"], metrics["groups_discarded"]) == (0.0, 4)
    assert (metrics["loss_hex"], metrics["tokens_trained"]) == ("0x0.0p+0", 0)
    assert metrics["reasons"]["update_without_gradient"] == metrics["skipped"] == 1


# --- overlong completions ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_tokens", "penalty"), [(1, 0.0), (8, 0.0), (9, -0.25), (10, -0.5), (12, -1.0), (99, -1.0)]
)
def test_soft_punishment(num_tokens: int, penalty: float) -> None:
    assert OverlongRule(12, 4).penalty(num_tokens) == penalty


def test_no_soft_punishment_by_default() -> None:
    assert [OverlongRule(12).penalty(n) for n in (1, 12, 13)] == [0.0, 0.0, 0.0]


def test_a_punished_success_is_still_one(tokenizer, make_test_trainer) -> None:
    trainer = make_test_trainer(
        make_questions(tokenizer, list("abcd")),
        function="always",
        algorithm={"overlong": {"soft_penalty_tokens": 12}},
    )
    batch, metrics = trainer.step()
    completions = [t for group in batch.groups for t in group.trajectories]
    assert [t.reward for t in completions] == [1.0 - t.num_tokens / 12 for t in completions]
    assert min(t.reward for t in completions) == 0.0  # as long as allowed
    assert all(t.successful for t in completions)
    assert metrics["pass_at_1"] == 1.0 and metrics["reward_mean"] < 0.5


# --- rewards that break ---------------------------------------------------------------------------


def test_a_reward_that_raises_costs_its_samples_only(tokenizer, make_test_trainer) -> None:
    trainer, _ = scripted(
        tokenizer,
        make_test_trainer,
        "abcd",
        {"a": "1000", "b": "1111", "c": "0000", "d": "0110"},
        function="raises_on_wrong",
    )
    batch, metrics = trainer.step()
    rewards = {g.question.id: [t.reward for t in g.trajectories] for g in batch.groups}
    assert rewards == {
        "a": [1.0, 0.0, 0.0, 0.0],
        "b": [1.0] * 4,
        "c": [0.0] * 4,
        "d": [0.0, 1.0, 1.0, 0.0],
    }
    assert metrics["reasons"] == {"ok": 7, "error:RuntimeError": 9}
    assert metrics["tokens_trained"] > 0 and metrics["skipped"] == 0


# --- replay ---------------------------------------------------------------------------------------


def test_the_replayed_trajectory_takes_slot_0(tokenizer, make_test_trainer) -> None:
    trainer, engine = scripted(
        tokenizer,
        make_test_trainer,
        "abcd",
        {"a": "1000", "b": "0000", "c": "0000", "d": "0001"},
        replay={"enabled": True, "start_success_rate": None},
    )
    trainer.step()
    engine.expect("a", "wrong", "wrong", "wrong", "right 5")
    engine.expect("d", "wrong", "wrong", "wrong", "right 5")
    for name in "bc":
        engine.expect(name, *["wrong"] * 4)
    batch = trainer.collector.collect(2, PhaseTimer())
    sources = {g.question.id: [t.source for t in g.trajectories] for g in batch.groups}
    assert sources == {
        "a": ["replay", "fresh", "fresh", "fresh"],
        "d": ["replay", "fresh", "fresh", "fresh"],
        "b": ["fresh"] * 4,
        "c": ["fresh"] * 4,
    }
    rewards = {g.question.id: g.rewards for g in batch.groups}
    assert rewards["a"] == rewards["d"] == [1.0, 0.0, 0.0, 0.0]  # 'right 5' was not reached
    assert all(g.trajectories[0].birth_step == 1 for g in batch.groups if g.from_source("replay"))
    assert all(t.birth_step == 2 for g in batch.groups for t in g.from_source("fresh"))


def test_a_phase_inside_another_is_counted_once(monkeypatch) -> None:
    now = iter([0.0, 1.0, 4.0, 5.0, 5.5, 6.0])  # outer begins, inner twice, outer ends
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = PhaseTimer()
    with clock.measure("rollout"):
        for _ in range(2):
            with clock.measure("replay"):
                pass
    assert clock.seconds == {"replay": 3.5, "rollout": 2.5}
