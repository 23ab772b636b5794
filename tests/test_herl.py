"""HeRL through the trainer: oracles H2 to H6 of the specification, and what must be left alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import ScriptedEngine, make_questions

from exgrpo_fast.experience import Completion, Group, Trajectory, Verdict
from exgrpo_fast.rollout.engine import UNOBSERVED, Observer, Request, Sampling
from exgrpo_fast.sources.hindsight import HindsightSource
from exgrpo_fast.trainer import Trainer
from exgrpo_kernels import policy_loss

HERL = {"enabled": True, "max_prompt_tokens": 240, "max_revisions": 3}
GRPO = {"advantage": "grpo", "std": "sample", "dual_clip": 3.0, "clip_low": 0.2, "clip_high": 0.2}
TRAIN = {"lr": 1e-3, "max_tokens_per_microbatch": 4096}


class RevisingEngine(ScriptedEngine):
    """Answers a hindsight prompt by the draft in it."""

    def __init__(self, tokenizer, questions, revisions: dict[str, str]) -> None:
        super().__init__(tokenizer, questions)
        self.revisions = revisions
        self.asked: list[str] = []

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        observer: Observer = UNOBSERVED,
    ) -> list[Completion]:
        for request in requests:
            if request.prompt_ids not in self.name_of:
                text = self.tokenizer.decode(request.prompt_ids)
                self.asked.append(text)
                (draft,) = [d for d in self.revisions if f"\n{d}\n" in text]
                self.name_of[request.prompt_ids] = text
                self.expect(text, self.revisions[draft])
        return super().generate(requests, sampling, observer)


def herl_trainer(
    tokenizer, make_test_trainer, responses: dict[str, list[str]], revisions: dict[str, str], **more
) -> tuple[Trainer, RevisingEngine]:
    questions = make_questions(tokenizer, list(responses))
    engine = RevisingEngine(tokenizer, questions, revisions)
    for name, lines in responses.items():
        engine.expect(name, *lines)
    size = len(next(iter(responses.values())))
    sections: dict[str, dict[str, Any]] = {
        "algorithm": GRPO,
        "hindsight": HERL,
        "train": TRAIN,
        "rollout": {
            "prompts_per_step": len(responses),
            "group_size": size,
            "max_completion_tokens": 16,
        },
    }
    for name, values in more.items():
        sections[name] = sections[name] | values
    return make_test_trainer(questions, engine=engine, function="graded", **sections), engine


H3 = [
    f"score {r} {name}"
    for r, name in zip([0.2, 0.6, 0.6, 0, 0.4, 0.2, 0.6], "abcdefg", strict=True)
]
H3_REVISIONS = {H3[1]: "score 0.9 x", H3[2]: "score 0.5 y", H3[6]: "score 0.6 z"}


def test_h3_bonus_winner_and_advantages(tokenizer, make_test_trainer) -> None:
    trainer, engine = herl_trainer(tokenizer, make_test_trainer, {"q": H3}, H3_REVISIONS)
    batch, metrics = trainer.step()
    (group,) = batch.groups
    shaped = [0.2, 0.615, 0.595, 0.0, 0.4, 0.2, 0.6, 0.9]
    assert group.rewards == pytest.approx(shaped, abs=1e-9)
    assert [t.source for t in group.trajectories] == ["fresh"] * 7 + ["hindsight"]
    advantages = [row.advantage for row in trainer.learner.rows([group])]
    expected = [-0.813967, 0.600887, 0.532701, -1.495825, -0.132110, -0.813967, 0.549748, 1.572534]
    assert advantages == pytest.approx(expected, abs=6e-7)
    assert metrics["hindsight_revisions"] == len(engine.asked) == 3
    assert (metrics["hindsight_better"], metrics["hindsight_joined"]) == (1, 1)
    assert metrics["hindsight_reward_mean"] == pytest.approx((0.9 + 0.5 + 0.6) / 3)


def test_the_revision_is_trained_behind_its_hindsight(tokenizer, make_test_trainer) -> None:
    """Its prompt is the hindsight prompt, its denominators are scored under it, only its response
    is trained, and r / (r + 1) is not clipped."""
    trainer, engine = herl_trainer(tokenizer, make_test_trainer, {"q": H3}, H3_REVISIONS)
    model = trainer.learner.policy.model
    batch = trainer.collector.collect(1, __import__("exgrpo_fast.collect").collect.Clock())
    winner = batch.groups[0].trajectories[-1]
    prompt = tokenizer.decode(winner.question.prompt_ids)
    assert H3[1] in prompt and "What it missed:\n- The final answer is right." in prompt
    assert prompt.startswith("<|user|>What is q + 0?") and prompt.endswith("<|end|><|assistant|>")
    ids = torch.tensor([[*winner.question.prompt_ids, *winner.token_ids.tolist()]])
    with torch.no_grad():
        log_p = model(ids).logits[0].double().log_softmax(-1)
    start = len(winner.question.prompt_ids) - 1
    plain = log_p[start:-1].gather(1, winner.token_ids[:, None])[:, 0]
    assert torch.allclose(winner.behaviour_logprobs.double(), plain, atol=1e-5)
    assert winner.shaping == 1.0
    report = trainer.learner.update(batch.groups, trainer.objective)
    assert report.kernel_metrics["num_shaped"] == winner.num_tokens
    assert report.kernel_metrics["shaped_mean"] == pytest.approx(0.5, abs=1e-6)


def test_naive_he_trains_under_the_question_alone(tokenizer, make_test_trainer) -> None:
    trainer, _ = herl_trainer(
        tokenizer, make_test_trainer, {"q": H3}, H3_REVISIONS, hindsight={"naive": True}
    )
    batch, _ = trainer.step()
    winner = batch.groups[0].trajectories[-1]
    assert winner.question.id == "q"
    whole = herl_trainer(tokenizer, make_test_trainer, {"q": H3}, H3_REVISIONS)[0].step()[0]
    behind_hindsight = whole.groups[0].trajectories[-1]
    assert torch.equal(winner.token_ids, behind_hindsight.token_ids)
    assert torch.equal(winner.behaviour_logprobs, behind_hindsight.behaviour_logprobs)


@pytest.mark.parametrize(
    ("reward", "revised", "shaped"),
    [(0.5, 1.0, 0.525), (0.5, 0.25, 0.4875), (0.857143, 1.0, 0.864286), (0.5, 0.5, 0.5)],
)
@pytest.mark.parametrize("clip", [False, True])
def test_h2_bonus(
    tokenizer, make_test_trainer, reward: float, revised: float, shaped: float, clip: bool
) -> None:
    first = f"score {reward} a"
    trainer, _ = herl_trainer(
        tokenizer,
        make_test_trainer,
        {"q": [first, "score 0.0 b"]},
        {first: f"score {revised} x"},
        hindsight={"clip_negative_bonus": clip},
    )
    batch, _ = trainer.step()
    expected = max(shaped, reward) if clip else shaped
    assert batch.groups[0].rewards[0] == pytest.approx(expected, abs=6e-7)
    joins = revised >= reward  # the default: a revision that is worse stays out
    assert [t.source for t in batch.groups[0].trajectories].count("hindsight") == joins


def test_a_worse_revision_joins_where_the_paper_is_followed(tokenizer, make_test_trainer) -> None:
    trainer, _ = herl_trainer(
        tokenizer,
        make_test_trainer,
        {"q": ["score 0.5 a", "score 0.0 b"]},
        {"score 0.5 a": "score 0.25 x"},
        hindsight={"choose": "always"},
    )
    batch, _ = trainer.step()
    assert batch.groups[0].rewards == pytest.approx([0.4875, 0.0, 0.25])


def test_solved_groups_are_left_alone_and_all_fail_ones_are_capped(
    tokenizer, make_test_trainer
) -> None:
    """Of a tie: those that ended by themselves first, then the shorter ones."""
    long = "score 0.0 " + "a " * 8
    responses = {
        "solved": ["score 1.0 a", "score 0.0 b", "score 0.0 c", "score 0.0 d"],
        "failed": [long, "score 0.0 bb bb", "score 0.0 c", "score 0.0 d d d d"],
    }
    trainer, engine = herl_trainer(
        tokenizer,
        make_test_trainer,
        responses,
        {line: "score 1.0 x" for line in responses["failed"]},
        hindsight={"max_revisions": 2},
    )
    batch, metrics = trainer.step()
    by_name = {group.question.id: group for group in batch.groups}
    assert by_name["solved"].rewards == [1.0, 0.0, 0.0, 0.0]
    assert [
        any(f"\n{line}\n" in text for text in engine.asked) for line in responses["failed"]
    ] == [
        False,
        True,
        True,
        False,
    ]
    assert by_name["failed"].rewards == pytest.approx([0.0, 0.05, 0.05, 0.0, 1.0])
    assert metrics["hindsight_all_fail_groups"] == 1
    assert metrics["hindsight_all_fail_became_mixed"] == 1


def test_a_hindsight_prompt_that_is_too_long_is_left_out(tokenizer, make_test_trainer) -> None:
    trainer, engine = herl_trainer(
        tokenizer, make_test_trainer, {"q": H3}, H3_REVISIONS, hindsight={"max_prompt_tokens": 40}
    )
    batch, metrics = trainer.step()
    assert engine.asked == [] and metrics["hindsight_skipped_long"] == 3
    assert batch.groups[0].rewards == pytest.approx([0.2, 0.6, 0.6, 0.0, 0.4, 0.2, 0.6])


def test_what_nobody_could_judge_leaves_its_group(tokenizer, make_test_trainer) -> None:
    responses = {
        "q": ["score 0.5 a", "illegible", "score 0.0 b"],
        "r": ["illegible", "illegible", "illegible"],
    }
    trainer, engine = herl_trainer(
        tokenizer, make_test_trainer, responses, {"score 0.5 a": "illegible"}
    )
    batch, metrics = trainer.step()
    (group,) = batch.groups
    assert group.question.id == "q" and group.rewards == [0.5, 0.0]
    assert metrics["unscored"] == 4 and metrics["hindsight_joined"] == 0
    assert len(engine.asked) == 1


def test_a_step_in_which_nothing_was_judged_stops_the_run(tokenizer, make_test_trainer) -> None:
    from exgrpo_fast.collect import NothingScored

    trainer, _ = herl_trainer(tokenizer, make_test_trainer, {"q": ["illegible"] * 3}, {})
    with pytest.raises(NothingScored, match="none of 3 responses got a verdict"):
        trainer.step()


def test_revisions_keep_to_groups_of_their_own(tokenizer, make_test_trainer) -> None:
    trainer, _ = herl_trainer(tokenizer, make_test_trainer, {"q": H3}, H3_REVISIONS)
    hindsight = trainer.collector.hindsight
    assert isinstance(hindsight, HindsightSource)
    (question,) = make_questions(tokenizer, ["q"])

    def member(source) -> Trajectory:
        tokens, zeros = torch.ones(3, dtype=torch.int64), torch.zeros(3)
        verdict = Verdict(0.0)
        return Trajectory(question, tokens, zeros, zeros, False, source=source, verdict=verdict)

    mixed = Group(question, (member("replay"), member("fresh")))
    groups, report = hindsight.revise([mixed], step=1)
    assert groups == [mixed] and report.revisions == 0


# --- H4 to H6: the loss ---------------------------------------------------------------------------

H5_RATIOS = [[1.1, 0.7], [1.3, 1.0, 0.9], [1.0, 1.2]]


@pytest.mark.parametrize(
    ("aggregation", "loss"), [("sequence_mean", 0.190895), ("token_mean", 0.282542)]
)
def test_h5_loss(tokenizer, make_test_trainer, aggregation: str, loss: float) -> None:
    """The negative of the objective's mean over responses (paper) or tokens (code)."""
    trainer, _ = herl_trainer(
        tokenizer, make_test_trainer, {"q": H3}, {}, algorithm={"aggregation": aggregation}
    )
    (question,) = make_questions(tokenizer, ["q"])
    members = [
        Trajectory(
            question,
            torch.ones(len(ratios), dtype=torch.int64),
            torch.zeros(len(ratios)),
            torch.zeros(len(ratios)),
            truncated=False,
            source="hindsight" if i == 2 else "fresh",
            shaping=1.0 if i == 2 else 0.0,
            verdict=Verdict(reward),
        )
        for i, (ratios, reward) in enumerate(zip(H5_RATIOS, [0.525, 0.4, 0.95], strict=True))
    ]
    rows = trainer.learner.rows([Group(question, tuple(members))])
    assert [row.advantage for row in rows] == pytest.approx(
        [-0.346843, -0.780396, 1.127239], abs=6e-7
    )
    lengths = torch.tensor([len(ratios) for ratios in H5_RATIOS])

    def spread(values: list[float]) -> torch.Tensor:
        return torch.tensor(values).repeat_interleave(lengths)

    result = policy_loss(
        torch.tensor([r for ratios in H5_RATIOS for r in ratios]).log(),
        torch.zeros(7),
        advantages=spread([row.advantage for row in rows]),
        behaviour_logprobs=torch.zeros(7),
        weights=spread([row.weight for row in rows]),
        shaping=spread([row.trajectory.shaping for row in rows]),
        objective=trainer.objective,
    )
    assert float(result.loss) == pytest.approx(loss, abs=6e-7)


def test_h6_dual_clip(tokenizer, make_test_trainer) -> None:
    trainer, _ = herl_trainer(tokenizer, make_test_trainer, {"q": H3}, {})
    one = torch.ones(1)
    result = policy_loss(
        torch.tensor([5.0]).log(),
        torch.zeros(1),
        advantages=-one,
        behaviour_logprobs=0 * one,
        weights=one,
        objective=trainer.objective,
    )
    assert float(result.loss) == pytest.approx(3.0)
