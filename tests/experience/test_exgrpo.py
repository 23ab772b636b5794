"""ExGRPO through the trainer itself: oracles O4, O7, O10 of the specification.

The engine is scripted or real; buffer, rewards, policy, loss and optimiser are always the real
ones, called by `Trainer.step`.
"""

from __future__ import annotations

import pytest
import torch
from conftest import ScriptedEngine, make_questions, terms_of
from toy_runs import replayed_in

from exgrpo_fast.core.types import Group, Trajectory, Verdict
from exgrpo_fast.experience.question_stream import QuestionStream
from exgrpo_fast.experience.replay.selectors import TrajectoryKey, choose
from exgrpo_fast.experience.replay.source import ReplaySource, score_keys
from exgrpo_fast.model.policy import Scores
from exgrpo_fast.run.checkpoint.format import load_state
from exgrpo_kernels import linear_logprob, policy_loss

ON = {"enabled": True, "start_success_rate": None}


class ScriptedStream(QuestionStream):
    """Draws what the test lists, retired or not."""

    def __init__(self, questions) -> None:
        super().__init__(questions, seed=0)
        self.listed: list[str] = []

    def draw(self, count, *, exclude=frozenset()):
        drawn, self.listed = self.listed[:count], self.listed[count:]
        return [self.by_id[name] for name in drawn]


def texts(outcome: str, *names: str) -> list[str]:
    """'0110', 'x', 'y' -> wrong, right x, right y, wrong."""
    right = iter(names)
    return [f"right {next(right)}" if c == "1" else "wrong" for c in outcome]


def buckets(replay: ReplaySource) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for question, bucket in zip(replay.data, replay.store.bucket.tolist(), strict=True):
        if bucket >= 0:
            found.setdefault(bucket, []).append(question.id)
    return {bucket: sorted(found[bucket]) for bucket in sorted(found)}


def retired(replay: ReplaySource) -> list[str]:
    return sorted(replay.data[i].id for i in replay.store.retired.nonzero().flatten().tolist())


def stored(replay: ReplaySource, question_id: str) -> list[list[int]]:
    """The token ids of each stored trajectory of a question."""
    rows, _ = replay.store.rows_of(torch.tensor([replay.place_of[question_id]]))
    return [tokens.tolist() for tokens in replay.store.read(rows).tokens.split()]


def test_o7_life_of_the_buffer(tokenizer, make_test_trainer) -> None:
    questions = make_questions(tokenizer, list("abcdefghijk"))
    engine = ScriptedEngine(tokenizer, questions)
    trainer = make_test_trainer(
        questions, engine=engine, replay={"enabled": True, "start_success_rate": 0.35}
    )
    stream = ScriptedStream(questions)
    trainer.stream = trainer.collector.stream = trainer.replay.stream = stream
    replay = trainer.replay

    def step(fresh: dict[str, list[str]], replayed: dict[str, list[str]] | None = None):
        for name, lines in {**(replayed or {}), **fresh}.items():
            engine.expect(name, *lines)
        stream.listed = list(fresh)
        _, metrics = trainer.step()
        replay.store.check_valid()
        assert not any(engine.lines.values()), "the step did not ask for what was scripted"
        return metrics["pass_at_1"], replay.active, buckets(replay), retired(replay)

    assert step(
        {
            "a": texts("1000", "1"),
            "b": texts("1111", *"1234"),
            "c": texts("0000"),
            "d": texts("0000"),
        }
    ) == (0.3125, False, {}, ["b"])
    assert step(
        {
            "e": texts("1100", "1", "2"),
            "f": texts("1110", *"123"),
            "g": texts("0000"),
            "b": texts("1110", *"123"),
        }
    ) == (0.5, True, {}, ["b"])
    assert step(
        {
            "e": texts("1000", "1"),
            "f": texts("1110", *"123"),
            "g": texts("0000"),
            "h": texts("1111", *"1234"),
        }
    ) == (0.5, True, {1: ["e"], 3: ["f"]}, ["b", "h"])
    assert step(
        {"i": texts("0110", "1", "2"), "j": texts("0000")},
        replayed={"e": texts("100", "2"), "f": texts("111", *"456")},
    ) == (0.5, True, {2: ["e", "i"]}, ["b", "f", "h"])
    # Question i comes twice, replayed and fresh; its visit without a success keeps the bucket.
    engine.expect("e", *texts("000"))
    engine.expect("i", *texts("110", "2", "3"), *texts("0000"))
    engine.expect("k", *texts("1000", "1"))
    stream.listed = ["k", "i"]
    _, metrics = trainer.step()
    assert metrics["pass_at_1"] == 0.3125
    assert replay.active, "activation is latched"
    assert buckets(replay) == {1: ["e", "k"], 3: ["i"]}
    assert {q: len(stored(replay, q)) for q in "eik"} == {"e": 2, "i": 3, "k": 1}


def test_exactly_the_threshold_does_not_start_replay(tokenizer, make_test_trainer) -> None:
    trainer = make_test_trainer(make_questions(tokenizer, list("abcd")), replay={"enabled": True})
    trainer.replay.maybe_activate(0.35)
    assert not trainer.replay.active
    trainer.replay.maybe_activate(0.3500001)
    assert trainer.replay.active


def run_steps(trainer, count: int) -> list[str]:
    return [trainer.step()[1]["loss_hex"] for _ in range(count)]


def weights(trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.learner.policy.model.named_parameters()}


def test_o10_without_experience_it_is_dr_grpo_bit_for_bit(tokenizer, make_test_trainer) -> None:
    questions = make_questions(tokenizer, [f"q{i}" for i in range(12)])
    plain = make_test_trainer(questions, function="even_length")
    rho_0 = make_test_trainer(
        questions, function="even_length", replay={**ON, "experience_ratio": 0.0}
    )
    assert run_steps(plain, 3) == run_steps(rho_0, 3)
    for (name, ours), theirs in zip(weights(plain).items(), weights(rho_0).values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_o10_what_is_replayed_is_what_was_stored(tokenizer, make_test_trainer) -> None:
    questions = make_questions(tokenizer, [f"q{i}" for i in range(8)])
    trainer = make_test_trainer(questions, function="even_length", replay=ON)
    generated: dict[str, list[Trajectory]] = {}
    num_replayed = 0
    for _ in range(6):
        batch, metrics = trainer.step()
        for group in batch.groups:
            for t in group.from_source("replay"):
                num_replayed += 1
                twins = [
                    old
                    for old in generated[t.question.id]
                    if torch.equal(old.token_ids, t.token_ids) and old.birth_step == t.birth_step
                ]
                assert len(twins) == 1
                assert torch.equal(twins[0].behaviour_logprobs, t.behaviour_logprobs)
                assert (t.shaping, t.reward, group.trajectories[0] is t) == (0.1, 1.0, True)
                assert len(group.trajectories) == 4
            generated.setdefault(group.question.id, []).extend(group.from_source("fresh"))
        ids = [group.question.id for group in batch.groups]
        assert len(ids) == len(set(ids)) == 4  # no question both fresh and replayed
        assert metrics["replay_frac"] == len(replayed_in(batch)) / 4 <= 0.5
    assert num_replayed >= 6


def test_o10_replay_under_the_weights_that_made_it_is_one_over_one_plus_beta(
    tokenizer, make_test_trainer
) -> None:
    questions = make_questions(tokenizer, [f"q{i}" for i in range(8)])
    trainer = make_test_trainer(
        questions, function="even_length", replay=ON, train={"lr": 1e-30, "weight_decay": 0.0}
    )
    found = [trainer.step()[1]["shaped_mean"] for _ in range(4)]
    assert found[0] is None  # the first step has nothing to replay
    assert [f for f in found if f is not None] == pytest.approx([1 / 1.1] * 3, abs=1e-6)


def test_the_chosen_trajectory_has_the_lowest_true_mean_entropy(
    tokenizer, make_test_trainer
) -> None:
    """Against full logits of the plain model, one sequence at a time, at the step's weights."""
    questions = make_questions(tokenizer, [f"q{i}" for i in range(6)])
    trainer = make_test_trainer(questions, function="even_length", replay=ON)
    compared = 0
    for step in range(5):
        replay, model = trainer.replay, trainer.learner.policy.model
        state, drawn = replay.rng.bit_generator.state, trainer.stream.state_dict()
        sample = replay.prepare(step + 1).sample
        replay.rng.bit_generator.state = state  # the step below draws the same again
        trainer.stream.load_state_dict(drawn)
        for (chosen,) in filter(None, sample.slots):
            candidates = stored(replay, chosen.question.id)
            means = []
            for candidate in candidates:
                ids = [*chosen.question.prompt_ids, *candidate]
                with torch.no_grad():
                    logits = model(torch.tensor([ids])).logits[0].double()
                log_p = logits.log_softmax(-1)[len(chosen.question.prompt_ids) - 1 : -1]
                means.append(float(-(log_p.exp() * log_p).sum(-1).mean()))
            assert float(chosen.entropies.mean()) == pytest.approx(min(means), abs=1e-5)
            compared += len(candidates)
        trainer.step()
    assert compared >= 8


def test_a_nan_from_the_rollout_is_not_kept(tokenizer, make_test_trainer) -> None:
    trainer = make_test_trainer(make_questions(tokenizer, list("abcd")), replay=ON)
    (question,) = make_questions(tokenizer, ["a"])

    def member(logprob: float, reward: float) -> Trajectory:
        logprobs = torch.tensor([-1.0, logprob])
        return Trajectory(
            question,
            torch.tensor([5, 6 + int(reward)]),
            logprobs,
            torch.zeros(2),
            truncated=False,
            verdict=Verdict(reward),
        )

    group = Group(question, (member(float("nan"), 1.0), member(-1.0, 1.0), member(-1.0, 0.0)))
    trainer.replay.update([group], step=1)
    assert len(stored(trainer.replay, "a")) == 1
    trainer.replay.store.check_valid()


def test_solved_questions_are_not_stored_where_they_do_not_retire(
    tokenizer, make_test_trainer
) -> None:
    trainer = make_test_trainer(
        make_questions(tokenizer, list("abcd")), function="always", replay={**ON, "retire": False}
    )
    _, metrics = trainer.step()
    assert metrics["replay_trajectories"] == metrics["retired_size"] == metrics["replay_size"] == 0
    assert trainer.replay.store.visits.tolist() == [1] * 4


def test_candidates_are_scored_while_others_are_generated(
    tokenizer, make_test_trainer, monkeypatch
) -> None:
    """An engine that runs elsewhere goes on meanwhile; both work with the same weights."""
    questions = make_questions(tokenizer, [f"q{i}" for i in range(8)])
    trainer = make_test_trainer(questions, function="even_length", replay=ON)
    engine, replay, seen = trainer.engine, trainer.replay, []
    generate, score, generating = engine.generate, replay._score, []

    def watched_generate(*arguments):
        generating.append(True)
        completions = generate(*arguments)
        generating.pop()
        return completions

    def watched_score(experiences):
        seen.append(bool(generating))
        return score(experiences)

    monkeypatch.setattr(engine, "generate", watched_generate)
    monkeypatch.setattr(replay, "_score", watched_score)
    replayed = [trainer.step()[1]["replay_frac"] for _ in range(4)]
    assert seen == [True] * 3 and replayed[1:] == [0.5] * 3


def test_fresh_rows_lose_their_clip_once_replay_is_active(tokenizer, make_test_trainer) -> None:
    questions = make_questions(tokenizer, list("abcdefgh"))
    trainer = make_test_trainer(questions, replay={"enabled": True})
    assert trainer.replay.objective(trainer.objective).clip_low == 0.2
    trainer.replay.active = True
    assert trainer.replay.objective(trainer.objective).clip_low is None
    keeps = make_test_trainer(questions, replay={**ON, "clip_fresh": True})
    assert keeps.replay.objective(keeps.objective).clip_high == 0.2


def test_o10_resume_reproduces_the_next_steps_bit_for_bit(tokenizer, make_test_trainer) -> None:
    questions = make_questions(tokenizer, [f"q{i}" for i in range(12)])
    settings = {"function": "even_length", "replay": ON, "train": {"minibatches": 2, "lr": 1e-3}}
    whole = make_test_trainer(questions, **settings)
    run_steps(whole, 3)  # in the middle of an epoch
    path = whole.save()
    expected = run_steps(whole, 3)

    resumed = make_test_trainer(questions, **settings)
    policy = resumed.learner.policy
    policy.model.load_state_dict(type(policy.model).from_pretrained(path / "hf").state_dict())
    resumed.load_state_dict(load_state(path))
    assert resumed.num_steps == 3 and resumed.replay.active
    assert run_steps(resumed, 3) == expected
    assert buckets(resumed.replay) == buckets(whole.replay)
    for (name, ours), theirs in zip(weights(whole).items(), weights(resumed).values(), strict=True):
        assert torch.equal(ours, theirs), name


# --- O4: the loss of a mixed batch ----------------------------------------------------------------

O4 = {  # row: (new log-probs, old log-probs)
    "A0": ([-0.10, -0.50, -1.20, -0.05], [-0.10, -0.80, -1.20, -0.05]),
    "A1": ([-0.30, -2.00, -0.40], [-0.30, -2.00, -0.90]),
    "A2": ([-0.70, -0.20], [-0.40, -0.20]),
    "A3": ([-0.15, -0.90, -0.60, -0.02], [-0.15, -0.90, -0.60, -0.30]),
    "B0": ([-0.25, -3.00, -0.80], [-0.35, -0.70, -2.00]),
    "B1": ([-0.40, -0.10, -1.50, -0.30], [-0.40, -0.50, -1.50, -0.30]),
    "B2": ([-0.05, -0.60], [-0.30, -0.60]),
    "B3": ([-1.00], [-1.00]),
}
O4_REWARDS = {"A": [1, 0, 0, 1], "B": [1, 0, 1, 0]}


@pytest.mark.parametrize(
    ("clip_fresh", "shaping", "loss"),
    [(True, 0.1, -0.031998), (False, 0.1, -0.038501), (False, 0.0, -0.071894)],
)
def test_o4_advantages_weights_and_objective_of_the_trainer(
    tokenizer, make_test_trainer, clip_fresh: bool, shaping: float, loss: float
) -> None:
    """The learner's own rows and the replay source's own objective, on given log-probs."""
    trainer = make_test_trainer(
        make_questions(tokenizer, list("abcdefgh")),
        replay={**ON, "clip_fresh": clip_fresh, "shaping": shaping},
        rollout={"prompts_per_step": 4, "group_size": 4, "max_completion_tokens": 4},
    )
    groups = []
    for name, rewards in O4_REWARDS.items():
        (question,) = make_questions(tokenizer, [name])
        members = []
        for i, reward in enumerate(rewards):
            old = torch.tensor(O4[f"{name}{i}"][1])
            replayed = (name, i) == ("B", 0)
            members.append(
                Trajectory(
                    question,
                    torch.ones(len(old), dtype=torch.int64),
                    old,
                    torch.zeros(len(old)),
                    truncated=False,
                    source="replay" if replayed else "fresh",
                    shaping=trainer.replay.recipe.shaping if replayed else 0.0,
                    verdict=Verdict(float(reward)),
                )
            )
        groups.append(Group(question, tuple(members)))
    rows = terms_of(trainer, groups)
    new = torch.cat([torch.tensor(O4[key][0]) for key in O4]).requires_grad_()
    lengths = torch.tensor([row.trajectory.num_tokens for row in rows])

    def spread(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32).repeat_interleave(lengths)

    objective = trainer.replay.objective(trainer.objective)
    if shaping == 0.0:
        assert objective.clip_low is None
    result = policy_loss(
        new,
        torch.zeros(len(new)),
        advantages=spread([row.advantage for row in rows]),
        behaviour_logprobs=torch.cat([row.trajectory.behaviour_logprobs for row in rows]),
        weights=spread([row.weight for row in rows]),
        shaping=spread([row.trajectory.shaping for row in rows]),
        objective=objective,
    )
    assert float(result.loss) == pytest.approx(loss, abs=6e-7)
    result.loss.backward()
    assert new.grad is not None
    if shaping:
        found = new.grad.split(lengths.tolist())[4]
        assert found.tolist() == pytest.approx([-0.001189, -0.003906, -0.000443], abs=6e-7)


# --- O5: which entropy ----------------------------------------------------------------------------

O5 = {
    "X": ([[2.0, 0, 0], [1, 1, 0], [0, 0, 3]], [0, 1, 2]),
    "Y": ([[4.0, 0, 0], [0, 0, 0], [0, 5, 0], [2, 0, 0], [0, 0, 4]], [0, 2, 1, 1, 2]),
}


@pytest.mark.parametrize(
    ("select", "chosen"),
    [("entropy", "Y"), ("nll", "X"), ("entropy_sum", "X"), ("highest_entropy", "X")],
)
def test_o5_definitions_of_entropy_disagree(select: TrajectoryKey, chosen: str) -> None:
    parts = [
        linear_logprob(torch.tensor(logits), torch.eye(3), torch.tensor(tokens))
        for logits, tokens in O5.values()
    ]
    scores = Scores(
        torch.cat([out.logprobs for out in parts]),
        torch.cat([out.entropy for out in parts]),
        torch.tensor([3, 5]),
    )
    means = scores.per_completion(scores.entropies).tolist()
    assert means == pytest.approx([0.683175, 0.439740], abs=6e-7)
    nll = (-scores.per_completion(scores.logprobs)).tolist()
    assert nll == pytest.approx([0.398821, 0.684699], abs=6e-7)
    sums = scores.per_completion(scores.entropies, "sum").tolist()
    assert sums == pytest.approx([2.049524, 2.198702], abs=6e-7)
    keys = score_keys(select, scores)
    assert "XY"[int(choose(torch.tensor([0, 0]), keys, 1))] == chosen


def test_o6_the_published_entropy_bug_is_not_reproduced() -> None:
    """The published function divides by the wrong mask of the wrong row, and picks the other one."""
    entropies = torch.tensor([0.2] * 16 + [0.0] + [0.5] * 4 + [0.0])  # each ends with its EOS
    scores = Scores(torch.zeros(22), entropies, torch.tensor([17, 5]))
    keys = score_keys("entropy", scores)
    assert keys.tolist() == pytest.approx([0.188235, 0.400000], abs=6e-7)
    assert choose(torch.tensor([0, 0]), keys, 1).tolist() == [0]
    width, prompt, other_row = 32, 3.0, 6  # R, sum of H over the prompt, L' of row 8
    published = [(prompt + sum(e.tolist())) / (width - other_row) for e in entropies.split([17, 5])]
    assert published == pytest.approx([0.238462, 0.192308], abs=6e-7)


def test_o8_every_group_weighs_the_same_while_experience_is_short(
    tokenizer, make_test_trainer
) -> None:
    """B = 128 with 10 replayed ones: 1 / 128 each, not the 0.05 and 0.004237 of the paper's sum."""
    trainer = make_test_trainer(make_questions(tokenizer, list("abcd")), replay=ON)
    (question,) = make_questions(tokenizer, ["a"])

    def member(source) -> Trajectory:
        return Trajectory(
            question,
            torch.ones(12, dtype=torch.int64),
            torch.zeros(12),
            torch.zeros(12),
            truncated=False,
            source=source,
            verdict=Verdict(0.0),
        )

    fresh = [Group(question, (member("fresh"),) * 4) for _ in range(118)]
    mixed = [Group(question, (member("replay"), *(member("fresh"),) * 3)) for _ in range(10)]
    rows = terms_of(trainer, [*mixed, *fresh])
    per_group = torch.tensor([12 * row.weight for row in rows]).view(128, 4).sum(1)
    assert per_group.tolist() == pytest.approx([0.0078125] * 128)
