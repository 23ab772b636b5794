"""HeRL through the trainer: oracles H2 to H6 of the specification, and what must be left alone."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from conftest import ScriptedEngine, make_questions, terms_of

from exgrpo_fast.core.types import Completion, Group, Trajectory, Verdict
from exgrpo_fast.experience.hindsight.source import HindsightSource
from exgrpo_fast.experience.replay.source import ReplaySource
from exgrpo_fast.experience.scoring import StreamingScorer
from exgrpo_fast.rollout.engine import UNOBSERVED, Observer, Request, Sampling
from exgrpo_fast.run.display import Screen
from exgrpo_fast.training.collector import NothingScored, PhaseTimer
from exgrpo_fast.training.evaluate import Evaluator
from exgrpo_fast.training.trainer import Trainer
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
                text = str(self.tokenizer.decode(list(request.prompt_ids)))
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
        sections[name] = sections.get(name, {}) | values
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
    advantages = [row.advantage for row in terms_of(trainer, [group])]
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
    batch = trainer.collector.collect(1, PhaseTimer())
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
    trainer, _ = herl_trainer(tokenizer, make_test_trainer, {"q": ["illegible"] * 3}, {})
    with pytest.raises(NothingScored, match="none of 3 completions got a verdict"):
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


RUBRICS_FILE = """
from exgrpo_fast.rewards import Rubric

def is_right(prompt, response, context):
    return response.startswith("right")

RUBRICS = [
    Rubric("right", 3.0, is_right, "It is right."),
    Rubric("kind", 1.0, None, "It is kind."),
]
"""


@pytest.mark.parametrize("status", [200, 500])
def test_a_judge_in_the_trainer(tokenizer, make_test_trainer, tmp_path, status: int) -> None:
    """Rubrics of both kinds in one reward, what was missed in the prompt of the revision; a judge
    that fails costs no response its reward, it only leaves them out."""
    path = tmp_path / "rubrics.py"
    path.write_text(RUBRICS_FILE)
    answers = {"right kind": 1, "right rude": 0, "wrong kind": 1, "wrong rude": 0}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = body["messages"][-1]["content"]
            kind = next((v for text, v in answers.items() if text in asked), 1)
            content = json.dumps({"results": [kind]})
            reply = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    judge = {
        "base_url": f"http://127.0.0.1:{server.server_address[1]}/v1",
        "model": "a judge",
        "api_key_env": None,
        "retries": 0,
    }
    rewards = {"functions": [f"{path}:RUBRICS"], "judge": judge}
    responses = {"q": ["right rude", "wrong kind", "wrong rude"]}
    try:
        trainer, engine = herl_trainer(
            tokenizer,
            make_test_trainer,
            responses,
            {"right rude": "right kind"},
            reward=rewards,
        )
        if status == 500:
            with pytest.raises(NothingScored, match="none of 3 completions got a verdict"):
                trainer.step()
            return
        batch, _ = trainer.step()
        (group,) = batch.groups
        assert group.rewards == pytest.approx([0.75 + 0.05 * 0.25, 0.25, 0.0, 1.0])
        verdict = group.trajectories[0].verdict
        assert verdict is not None and verdict.checks == (("right", True), ("kind", False))
        (prompt,) = engine.asked
        assert "What it met:\n- It is right.\nWhat it missed:\n- It is kind.\n" in prompt
    finally:
        server.shutdown()
        server.server_close()


def test_eval_revises_what_failed_until_it_is_right(tokenizer, make_test_trainer) -> None:
    responses = {"q": ["score 1.0 a", "score 0.5 b"], "r": ["score 0.0 c", "score 0.0 d"]}
    revisions = {
        "score 0.5 b": "score 1.0 x",
        "score 0.0 c": "score 0.2 y",
        "score 0.0 d": "score 1.0 z",
        "score 0.2 y": "score 1.0 w",
    }
    trainer, engine = herl_trainer(tokenizer, make_test_trainer, responses, revisions)
    hindsight = trainer.collector.hindsight
    assert isinstance(hindsight, HindsightSource)
    evaluator = Evaluator(
        engine,
        trainer.collector.verifier,
        Screen(),
        sampling=Sampling(16),
        n=2,
        ks=[1],
        seed=0,
        revisions=2,
        prompt=hindsight.prompt,
    )
    found = evaluator(list(trainer.stream.by_id.values()))
    assert found.avg_at_n == 0.25
    assert found.avg_at_n_revised == [0.75, 1.0]
    assert len(engine.asked) == 4  # three in the first round, the one still wrong in the second


def test_responses_are_scored_while_others_are_generated(tokenizer, make_test_trainer) -> None:
    """With two batches of two, verdicts of the first are there before the second is finished."""
    questions = make_questions(tokenizer, ["a", "b"])
    trainer = make_test_trainer(
        questions,
        function="even_length",
        rollout={
            "prompts_per_step": 2,
            "group_size": 2,
            "max_batch_sequences": 2,
            "max_completion_tokens": 12,
        },
    )
    collector, done = trainer.collector, []

    class Watch(StreamingScorer):
        def on_poll(self) -> None:
            super().on_poll()
            if self.future is not None:
                time.sleep(0.05)  # a token takes longer on a model of any size
                done.append((len(self.samples), self.future.num_done))

    grading = Watch(collector.verifier, [questions[0]] * 2 + [questions[1]] * 2)
    completions = collector.fresh.start(questions, [2, 2], step=1).wait(grading)
    assert done[-1] == (2, 2), "the first two were not scored before the others were finished"
    texts = [collector.verifier.decode(c.token_ids.tolist()) for c in completions]
    assert [v.reward for v in grading.verdicts()] == [float(len(t) % 2 == 0) for t in texts]


def test_a_success_with_hindsight_does_not_make_a_question_stored(
    tokenizer, make_test_trainer
) -> None:
    trainer, _ = herl_trainer(
        tokenizer,
        make_test_trainer,
        {"q": ["score 0.0 a", "score 0.0 b"], "r": ["score 1.0 c", "score 0.0 d"]},
        {line: "score 1.0 x" for line in ("score 0.0 a", "score 0.0 b")},
        replay={"enabled": True, "start_success_rate": None},
    )
    batch, metrics = trainer.step()
    assert [g.num_successes for g in batch.groups if g.question.id == "q"] == [1]
    assert isinstance(trainer.replay, ReplaySource)
    assert trainer.replay.store.bucket.tolist() == [-1, 1]
    assert metrics["replay_trajectories"] == 1


# --- H4 to H6: the loss ---------------------------------------------------------------------------

H5_RATIOS = [[1.1, 0.7], [1.3, 1.0, 0.9], [1.0, 1.2]]


@pytest.mark.parametrize(
    ("gamma", "ratio", "value", "slope"),
    [
        (1.0, 0.1, 0.090909, 0.082645),
        (1.0, 0.5, 0.333333, 0.222222),
        (1.0, 1.0, 0.5, 0.25),
        (1.0, 2.0, 0.666667, 0.222222),
        (1.0, 10.0, 0.909091, 0.082645),
        (0.1, 1.0, 0.909091, 0.082645),
        (0.1, 0.1, 0.5, 0.25),
    ],
)
def test_h4_shaping(
    tokenizer, make_test_trainer, gamma: float, ratio: float, value: float, slope: float
) -> None:
    trainer, _ = herl_trainer(tokenizer, make_test_trainer, {"q": H3}, {})
    new, one = torch.tensor([ratio]).log().requires_grad_(), torch.ones(1)
    result = policy_loss(
        new,
        torch.zeros(1),
        advantages=one,
        behaviour_logprobs=0 * one,
        weights=one,
        shaping=gamma * one,
        objective=trainer.objective,
    )
    result.loss.backward()
    assert new.grad is not None
    assert (-float(result.loss.detach()), -float(new.grad)) == pytest.approx(
        (value, slope), abs=6e-7
    )


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
    rows = terms_of(trainer, [Group(question, tuple(members))])
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
