"""EAPO through the trainer: what joins a group, what it weighs, what is left alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import exit_code, make_questions, terms_of

from exgrpo_fast.build.quickstart.toy_model import make_model
from exgrpo_fast.config import ConfigError, validate
from exgrpo_fast.core.types import Group, Guidance, Trajectory, Verdict
from exgrpo_fast.experience.prior.compatibility import (
    PriorError,
    read_vocabulary,
    refuse_other_vocabulary,
)
from exgrpo_fast.experience.prior.importance import columns_of
from exgrpo_fast.experience.prior.source import PriorSource
from exgrpo_fast.model.folder_reading import load_tokenizer, model_files
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.rollout.engine import UNOBSERVED
from exgrpo_fast.run.checkpoint.format import load_state
from exgrpo_fast.training.collector import PhaseTimer
from exgrpo_fast.training.trainer import Trainer
from exgrpo_kernels import policy_loss

DAPO = {
    "advantage": "grpo",
    "std": "sample",
    "clip_low": 0.2,
    "clip_high": 0.28,
    "aggregation": "token_mean",
}
STILL = {"lr": 1e-30, "weight_decay": 0.0}


@pytest.fixture(scope="session")
def prior_folder(tokenizer, model_folder: Path, tmp_path_factory: Any) -> Path:
    """The policy with a changed head, so that the two disagree here and there."""
    path = tmp_path_factory.mktemp("prior")
    model = make_model(tokenizer, seed=0, layers=2, width=64)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(model.lm_head.weight.shape, generator=generator)
        model.lm_head.weight.add_(0.1 * noise)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def make_eapo(tokenizer, make_test_trainer, prior_folder: Path) -> Callable[..., Trainer]:
    """make(prior={...}, **sections) -> a trainer whose policy is guided by that prior."""

    def make(prior: dict[str, Any] | None = None, **sections: Any) -> Trainer:
        settings = {"enabled": True, "model": str(prior_folder), "block_tokens": 5}
        sections.setdefault("algorithm", DAPO)
        return make_test_trainer(
            make_questions(tokenizer, [f"q{i}" for i in range(12)]),
            function=sections.pop("function", "even_length"),
            prior_resampling=settings | (prior or {}),
            **sections,
        )

    return make


def source_of(trainer: Trainer) -> PriorSource:
    assert isinstance(trainer.collector.prior, PriorSource)
    return trainer.collector.prior


def prior_of(trainer: Trainer) -> Policy:
    prior = source_of(trainer).prior
    assert prior is not None
    return prior


def guided_of(batch) -> list[Trajectory]:
    return [t for group in batch.groups for t in group.from_source("prior")]


def plain_logprobs(model, trajectory: Trajectory) -> torch.Tensor:
    """float64 [T, V] of the plain model, one completion alone."""
    prompt = trajectory.question.prompt_ids
    ids = torch.tensor([[*prompt, *trajectory.token_ids.tolist()]])
    logits = model(ids, use_cache=False).logits[0]
    return logits.double().log_softmax(-1)[len(prompt) - 1 : -1]


# --- the group ------------------------------------------------------------------------------------


def test_one_slot_of_each_group_is_guided_and_stands_last(make_eapo) -> None:
    batch, metrics = make_eapo().step()
    for group in batch.groups:
        assert [t.source for t in group.trajectories] == ["fresh"] * 3 + ["prior"]
    assert metrics["prior_completions"] == 4
    assert metrics["prior_tokens"] == sum(t.num_tokens for t in guided_of(batch))
    assert metrics["pass_at_1"] == metrics["pass_at_1_fresh"]


def test_several_guided_ones(make_eapo) -> None:
    batch, _ = make_eapo({"augmented_per_group": 2}).step()
    for group in batch.groups:
        assert [t.source for t in group.trajectories] == ["fresh"] * 2 + ["prior"] * 2
        first, second = group.from_source("prior")
        assert first.token_ids.tolist() != second.token_ids.tolist()


def test_e7_the_hard_switch(make_eapo) -> None:
    source = source_of(make_eapo({"stop_after_steps": 60}))
    assert [source.counts(2, step=s) for s in (1, 60, 61)] == [[1, 1], [1, 1], [0, 0]]
    trainer = make_eapo({"stop_after_steps": 2})
    found = [trainer.step()[1].get("prior_completions") for _ in range(4)]
    assert found == [4, 4, None, None]


def test_linear_annealing_guides_a_falling_share(make_eapo) -> None:
    source = source_of(make_eapo({"annealing": "linear", "stop_after_steps": 10}))
    shares = [sum(source.counts(4000, step=s)) / 4000 for s in range(1, 13)]
    expected = [max(0.0, 1 - (s - 1) / 10) for s in range(1, 13)]
    assert shares == pytest.approx(expected, abs=0.04)
    assert source.counts(50, step=4) == source.counts(50, step=4)


def test_the_behaviour_column_is_the_papers_mixture(make_eapo, prior_folder: Path) -> None:
    trainer = make_eapo()
    batch = trainer.collector.collect(1, PhaseTimer())
    redrawn = 0
    for t in guided_of(batch):
        assert t.guidance is not None and t.token_weights is None
        old, prior = (
            plain_logprobs(p.model, t).gather(1, t.token_ids[:, None])[:, 0]
            for p in (trainer.learner.policy, prior_of(trainer))
        )
        rho = float(t.guidance.redrawn.double().mean())
        mixed = ((1 - rho) * old.exp() + rho * prior.exp()).log()
        assert torch.allclose(t.behaviour_logprobs.double(), mixed, atol=1e-4)
        assert torch.allclose(t.guidance.prior_logprobs.double(), prior, atol=1e-4)
        assert torch.equal(t.guidance.redrawn, t.guidance.tested > 0.5)
        redrawn += int(t.guidance.redrawn.sum())
    assert redrawn > 0


def test_a_prior_that_is_the_policy_redraws_nothing(make_eapo, model_folder: Path) -> None:
    trainer = make_eapo({"model": str(model_folder)})
    batch, metrics = trainer.step()
    assert metrics["prior_redrawn_frac"] == 0.0 and metrics["prior_rate_mean"] is None
    assert metrics["prior_kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["prior_ratio_kept_mean"] in (None, pytest.approx(1.0, abs=1e-5))
    for t in guided_of(batch):
        assert t.guidance is not None and not t.guidance.redrawn.any()


def test_switched_off_it_is_the_plain_run_bit_for_bit(make_eapo) -> None:
    plain = make_eapo({"enabled": False})
    annealed = make_eapo({"annealing": "linear", "stop_after_steps": 1})
    guided = [annealed.step()[1] for _ in range(1)]
    assert guided[0]["prior_completions"] == 4
    annealed.num_steps, plain.num_steps = 10, 10  # behind T, with the same seeds
    plain.stream.load_state_dict(annealed.stream.state_dict())
    plain.learner.policy.model.load_state_dict(annealed.learner.policy.model.state_dict())
    plain.learner.load_state_dict(annealed.learner.state_dict())
    assert plain.step()[1]["loss_hex"] == annealed.step()[1]["loss_hex"]


# --- the filter and the loss ----------------------------------------------------------------------


def test_what_failed_stays_in_the_baseline_and_leaves_the_loss(make_eapo) -> None:
    trainer = make_eapo()
    seen = {True: 0, False: 0}
    for _ in range(4):
        batch, metrics = trainer.step()
        rows = terms_of(trainer, batch.groups)
        kept = [row.trajectory for row in rows if not row.trajectory.masked]
        normaliser = 1 / sum(t.num_tokens for t in kept)
        for row in rows:
            t = row.trajectory
            assert t.masked == (t.source == "prior" and t.reward != 1.0)
            assert row.weight == (0.0 if t.masked else pytest.approx(normaliser))
            seen[t.masked] += t.source == "prior"
        for group in batch.groups:
            rewards = torch.tensor(group.rewards, dtype=torch.float64)
            expected = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
            members = {id(t) for t in group.trajectories}
            found = [r.advantage for r in rows if id(r.trajectory) in members]
            assert found == pytest.approx(expected.tolist(), abs=1e-9)
        share = sum(not t.masked for t in guided_of(batch)) / 4
        assert metrics["prior_kept_frac"] == share
    assert min(seen.values()) > 0
    unfiltered = make_eapo({"positive_only": False}).step()[0]
    assert not any(t.masked for t in guided_of(unfiltered))


def reference(trainer: Trainer, groups, importance: str, cap: float) -> tuple[float, float]:
    """(loss, norm of its gradient) at the start of the step, from whole distributions of the plain
    models and autograd."""
    policy, prior = trainer.learner.policy.model, prior_of(trainer).model
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for group in groups:
        size, num_guided = len(group.trajectories), len(group.from_source("prior"))
        factors, ratios = [], []
        for t in group.trajectories:
            with torch.no_grad():
                ratio, factor = start_weights(t, policy, prior, importance, cap, size, num_guided)
            now = plain_logprobs(policy, t).gather(1, t.token_ids[:, None])[:, 0]
            ratios.append(ratio * (now - now.detach()).exp())
            factors.append(factor)
        rewards = torch.tensor(group.rewards, dtype=torch.float64)
        weights = torch.stack([f.mean() for f in factors])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        advantages = advantages - (weights * advantages).sum() / weights.sum()
        for t, a, ratio, factor in zip(
            group.trajectories, advantages, ratios, factors, strict=True
        ):
            if not t.masked:
                tokens += t.num_tokens
                clipped = ratio.clamp(0.8, 1.28)
                total = total - (factor * torch.minimum(ratio * a, clipped * a)).sum()
    gradients = torch.autograd.grad(total / tokens, list(policy.parameters()))
    return float(total) / tokens, float(torch.cat([g.flatten() for g in gradients]).norm())


def start_weights(
    t: Trajectory, policy, prior, importance: str, cap: float, size: int, num_guided: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ratio, factor) of every token of one completion before the first update, by the formulas."""
    logp, logr = plain_logprobs(policy, t), plain_logprobs(prior, t)
    chosen = t.token_ids[:, None]
    old, r = (table.gather(1, chosen)[:, 0] for table in (logp, logr))
    rejected = logp - logr > 0.5
    rate = (logp.exp() * rejected).sum(1)
    mu = torch.where(rejected.gather(1, chosen)[:, 0], 0.0, old.exp()) + rate * r.exp()
    ones = torch.ones_like(old)
    if importance == "mis":
        over = float((mu.log() - old).sum().exp())
        return ones, ones * size / (size - num_guided + num_guided * over)
    if t.guidance is None or importance == "none":
        return ones, ones
    flags = t.guidance.redrawn
    rho = float(flags.double().mean())
    whole = float(old.sum().exp() / ((1 - rho) * old.sum().exp() + rho * r.sum().exp()))
    return {
        "sis_token": (old.exp() / ((1 - rho) * old.exp() + rho * r.exp()), ones),
        "sis_seq": (ones * whole, ones),
        "sis_geo": (ones * whole ** (1 / len(old)), ones),
        "flag_token": (torch.where(flags, (old - r).exp(), ones), ones),
        "exact_token": (ones, (old.exp() / mu).clamp(max=cap)),
        "exact_traj": (ones, ones * min(float((old.exp() / mu).prod()), cap)),
    }[importance]


@pytest.mark.parametrize(
    "importance",
    ["none", "sis_token", "sis_seq", "sis_geo", "flag_token", "exact_token", "exact_traj", "mis"],
)
def test_what_is_trained_is_the_formula_of_its_mode(make_eapo, importance: str) -> None:
    trainer = make_eapo(
        {"importance": importance, "weight_cap": 2.0, "positive_only": False},
        train=STILL,
        algorithm=DAPO,
    )
    norms, plain = [], []
    for _ in range(2):
        batch, metrics = trainer.step()
        loss, norm = reference(trainer, batch.groups, importance, 2.0)
        assert metrics["loss"] == pytest.approx(loss, abs=2e-5)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=5e-4)
        norms.append(norm)
        plain.append(reference(trainer, batch.groups, "none", 2.0)[1])
        has_law = importance in ("exact_token", "exact_traj", "mis")
        assert (metrics["prior_rate_mean"] is not None) == has_law
    if importance != "none":  # the mode matters on these completions
        assert norms != pytest.approx(plain, rel=2e-3)


def test_e5_losses(make_eapo, tokenizer) -> None:
    """The specification's three completions, the guided one being that of E3."""
    trainer = make_eapo(rollout={"prompts_per_step": 1, "group_size": 3})
    (question,) = make_questions(tokenizer, ["a"])
    redrawn = torch.tensor([False, False, True, False, False, True])
    old = torch.tensor([-0.2, -1, -3, -0.5, -0.1, -2])
    prior = torch.tensor([-0.3, -0.7, -0.4, -0.6, -0.1, -0.9])
    now = torch.tensor([-0.18, -0.95, -2.7, -0.52, -0.09, -2.1])

    def losses(rewards, behaviour: torch.Tensor) -> float:
        fresh = [torch.tensor([1.05, 0.70, 1.40]).log(), torch.tensor([0.9, 1.35]).log()]
        olds = [torch.zeros(3), torch.zeros(2), behaviour]
        guidance = Guidance(redrawn, old, prior, old - prior, torch.full((6,), -1))
        members = [
            Trajectory(
                question,
                torch.ones(len(logprobs), dtype=torch.int64),
                logprobs,
                torch.zeros(len(logprobs)),
                truncated=False,
                source="fresh" if i < 2 else "prior",
                verdict=Verdict(reward),
                guidance=guidance if i == 2 else None,
            )
            for i, (logprobs, reward) in enumerate(zip(olds, rewards, strict=True))
        ]
        group = Group(question, tuple(source_of(trainer).mask_failed(t) for t in members))
        rows = terms_of(trainer, [group])
        result = policy_loss(
            torch.cat([*fresh, now]),
            torch.zeros(11),
            advantages=torch.cat(
                [torch.full_like(o, r.advantage) for o, r in zip(olds, rows, strict=True)]
            ),
            behaviour_logprobs=torch.cat(olds),
            weights=torch.cat(
                [torch.full_like(o, r.weight) for o, r in zip(olds, rows, strict=True)]
            ),
            shaping=torch.zeros(11),
            objective=trainer.objective,
        )
        return float(result.loss)

    token = columns_of("sis_token", old_T=old, prior_T=prior, redrawn_T=redrawn)
    assert losses([0.0, 1.0, 1.0], token.behaviour_logprobs) == pytest.approx(-0.026337, abs=6e-7)
    assert losses([0.0, 1.0, 0.0], token.behaviour_logprobs) == pytest.approx(-0.128172, abs=6e-7)
    whole = now - math.log(0.083312)
    assert losses([0.0, 1.0, 1.0], whole) == pytest.approx(0.200504, abs=6e-7)
    geometric = now - math.log(0.083312) / 6
    assert losses([0.0, 1.0, 1.0], geometric) == pytest.approx(0.018620, abs=1e-6)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0, 0, 1, 1], [-0.866024, -0.866024, 0.866024, 0.866024]),
        ([0, 0, 0, 1], [-0.499999, -0.499999, -0.499999, 1.499997]),
        ([1, 1, 1, 0], [0.499999, 0.499999, 0.499999, -1.499997]),
        ([1, 1, 1, 1], [0.0] * 4),
        ([0] * 15 + [1], [-0.249999] * 15 + [3.749985]),
    ],
)
def test_e4_advantages(make_eapo, tokenizer, rewards: list[int], expected: list[float]) -> None:
    trainer = make_eapo()
    (question,) = make_questions(tokenizer, ["a"])
    members = [
        Trajectory(
            question,
            torch.ones(2, dtype=torch.int64),
            torch.zeros(2),
            torch.zeros(2),
            truncated=False,
            source="prior" if i == len(rewards) - 1 else "fresh",
            verdict=Verdict(float(reward)),
        )
        for i, reward in enumerate(rewards)
    ]
    rows = terms_of(trainer, [Group(question, tuple(members))])
    assert [row.advantage for row in rows] == pytest.approx(expected, abs=6e-7)


# --- beside the other methods ---------------------------------------------------------------------


def test_a_group_can_hold_a_replayed_and_a_guided_one(make_eapo) -> None:
    """Replay keeps and counts what the policy has done alone."""
    trainer = make_eapo(replay={"enabled": True, "start_success_rate": None, "retire": False})
    kinds = set()
    for _ in range(5):
        batch, metrics = trainer.step()
        for group in batch.groups:
            sources = [t.source for t in group.trajectories]
            kinds.add(tuple(sources))
            assert len(sources) == 4 and sources[-1] == "prior"
        stored = trainer.replay.store.rows
        assert metrics["replay_trajectories"] == int((stored["question"] >= 0).sum())
    assert ("replay", "fresh", "fresh", "prior") in kinds
    assert ("fresh", "fresh", "fresh", "prior") in kinds


def test_guided_successes_say_nothing_of_how_hard_a_question_is(make_eapo, tokenizer) -> None:
    trainer = make_eapo(replay={"enabled": True, "start_success_rate": None})
    (question,) = make_questions(tokenizer, ["q0"])

    def member(source, reward: float, token: int) -> Trajectory:
        tokens, zeros = torch.tensor([token, 1]), torch.zeros(2)
        verdict = Verdict(reward)
        return Trajectory(question, tokens, zeros, zeros, False, source=source, verdict=verdict)

    failed = [member("fresh", 0.0, i) for i in range(3)]
    trainer.replay.update([Group(question, (*failed, member("prior", 1.0, 7)))], step=1)
    assert trainer.replay.store.bucket_sizes()[1:] == [0, 0, 0, 0]
    solved = [member("fresh", 1.0, i) for i in range(3)]
    group = Group(question, (*solved, member("prior", 0.0, 7)))
    assert trainer.replay.update([group], step=2) == ["q0"]


def test_hindsight_leaves_guided_groups_alone(make_eapo) -> None:
    sections = {"train": {"max_tokens_per_microbatch": 4096}, "function": "never"}
    herl = {"enabled": True, "max_prompt_tokens": 240}
    trainer = make_eapo({"stop_after_steps": 1}, hindsight=herl, **sections)
    found = [trainer.step()[1]["hindsight_groups_failed"] for _ in range(2)]
    assert found == [0, 4]
    both = make_eapo(hindsight=herl | {"with_prior": True}, **sections)
    assert both.step()[1]["hindsight_groups_failed"] == 4


def test_groups_that_are_mixed_thanks_to_the_prior_are_counted(make_eapo) -> None:
    batch, metrics = make_eapo().step()
    expected = 0
    for group in batch.groups:
        own = {t.reward for t in group.from_source("fresh")}
        expected += len(own) == 1 and len(set(group.rewards)) == 2
    assert metrics["prior_groups_mixed"] == expected


def test_dynamic_sampling_guides_the_groups_it_adds(make_eapo) -> None:
    trainer = make_eapo(
        rollout={
            "prompts_per_step": 4,
            "group_size": 2,
            "max_completion_tokens": 12,
            "dynamic_sampling": {"enabled": True, "max_extra_batches": 2},
        }
    )
    batch, metrics = trainer.step()
    assert len(batch.generated) > 4
    assert metrics["prior_completions"] == len(batch.generated)
    assert metrics["prior_tokens"] == sum(
        t.num_tokens for group in batch.generated for t in group.from_source("prior")
    )


def test_an_engine_that_is_stepped_guides_beside_the_fresh_completions(
    make_eapo, monkeypatch
) -> None:
    """The same completions, finished before the generation of the fresh ones is."""
    plain = make_eapo()
    expected = [t.token_ids.tolist() for t in guided_of(plain.step()[0])]
    trainer = make_eapo()
    drafter, scorer = source_of(trainer).resampler.drafter, source_of(trainer).resampler.scorer
    monkeypatch.setattr(drafter, "concurrent", True)
    generate, events = trainer.engine.generate, []
    score = scorer.score
    monkeypatch.setattr(
        scorer,
        "score",
        lambda *args, **options: (events.append("round"), score(*args, **options))[1],
    )

    def watched(requests, sampling, observer=UNOBSERVED):
        completions = generate(requests, sampling, observer)
        events.append("fresh")
        return completions

    monkeypatch.setattr(trainer.engine, "generate", watched)
    found = [t.token_ids.tolist() for t in guided_of(trainer.step()[0])]
    assert found == expected
    assert events.index("fresh") >= 2


def test_resume_reproduces_the_next_steps_bit_for_bit(make_eapo) -> None:
    settings = {"annealing": "linear", "stop_after_steps": 6}
    whole = make_eapo(settings)
    whole.step()
    path = whole.save()
    expected = [whole.step()[1]["loss_hex"] for _ in range(2)]
    resumed = make_eapo(settings)
    policy = resumed.learner.policy
    policy.model.load_state_dict(type(policy.model).from_pretrained(path / "hf").state_dict())
    resumed.load_state_dict(load_state(path))
    assert [resumed.step()[1]["loss_hex"] for _ in range(2)] == expected


def test_the_prior_never_changes(make_eapo) -> None:
    trainer = make_eapo()
    prior = prior_of(trainer)
    before = {name: value.clone() for name, value in prior.model.state_dict().items()}
    assert not any(parameter.requires_grad for parameter in prior.model.parameters())
    trainer.step()
    for name, value in prior.model.state_dict().items():
        assert torch.equal(value, before[name]), name


# --- what is refused ------------------------------------------------------------------------------


def saved(path: Path, tokenizer, *, rows: int | None = None, eos: Any = None) -> str:
    model = make_model(tokenizer, seed=0, layers=1, width=64)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    if eos is not None:
        model.generation_config.eos_token_id = eos
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def refusal(model_folder: Path, folder: str) -> str | None:
    try:
        refuse_other_vocabulary(
            read_vocabulary(model_files(str(model_folder))),
            read_vocabulary(model_files(folder)),
        )
    except PriorError as error:
        return str(error)
    return None


def test_rows_of_padding_are_allowed_and_missing_ones_are_not(
    tokenizer, model_folder: Path, tmp_path: Path
) -> None:
    size = len(tokenizer)
    for rows in (size, size + 1, -(-size // 64) * 64):
        folder = saved(tmp_path / str(rows), tokenizer, rows=rows)
        assert refusal(model_folder, folder) is None, rows
    folder = saved(tmp_path / "short", tokenizer, rows=size - 1)
    said = refusal(model_folder, folder)
    assert said and f"has {size - 1} rows for {size} tokens" in said and "\n" not in said


def test_another_tokenizer_is_refused_even_of_equal_size(
    tokenizer, model_folder: Path, tmp_path: Path
) -> None:
    from exgrpo_fast.build.quickstart.toy_model import make_tokenizer

    other = make_tokenizer(
        ["quick brown foxes jump over lazy dogs " * 3] * 3, vocab_size=len(tokenizer)
    )
    assert len(other) == len(tokenizer)
    larger = load_tokenizer(str(model_folder))
    larger.add_tokens(["<|more|>"])
    for name, vocabulary in (("other", other), ("larger", larger)):
        folder = saved(tmp_path / name, vocabulary)
        said = refusal(model_folder, folder)
        assert said and "different tokenizers" in said and folder in said
        assert str(model_folder) in said and "\n" not in said


def test_another_end_token_is_refused(tokenizer, model_folder: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "ends", tokenizer, eos=[tokenizer.eos_token_id, 5])
    said = refusal(model_folder, folder)
    assert said and f"[{tokenizer.eos_token_id}, 5]" in said and "different tokens" in said


def test_the_command_refuses_in_one_line_before_a_model_is_loaded(
    tokenizer, model_folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    folder = saved(tmp_path / "ends", tokenizer, eos=[5])
    monkeypatch.setattr(
        "exgrpo_fast.build.models.load_model", lambda name: pytest.fail("was loaded")
    )
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"prompt": "What is 1 + 2?", "answer": "3"}) + "\n")
    options = ["--model.name", str(model_folder), "--data.train", str(data)]
    options += ["--rollout.max_completion_tokens", "64"]
    cases = {
        folder: "they end completions by different tokens",
        str(tmp_path / "missing"): "prior_resampling.model: ",
    }
    for model, words in cases.items():
        out = tmp_path / Path(model).name / "run"
        more = [*options, "--prior_resampling.model", model]
        assert exit_code("train", "eapo", "--no-supervise", "--out", out, *more) == 2
        err = capsys.readouterr().err.splitlines()
        said = [line for line in err if line.startswith("exgrpo-fast")]
        assert len(said) == 1 and words in said[0]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"rollout": {"group_size": 2}, "prior_resampling": {"augmented_per_group": 2}},
            "no fresh",
        ),
        ({"rollout": {"group_size": 2}, "replay": {"enabled": True}}, "no fresh slot"),
        ({"rollout": {"temperature": 0.8}}, "at temperature 1"),
        (
            {"prior_resampling": {"annealing": "linear", "stop_after_steps": None}},
            "stop_after_steps",
        ),
    ],
)
def test_settings_that_do_not_fit_together(sections: dict[str, Any], words: str) -> None:
    tree = {"prior_resampling": {"enabled": True}}
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    with pytest.raises(ConfigError, match=words):
        validate(tree)


# --- two stages in one run ------------------------------------------------------------------------


def test_the_prior_is_made_first_and_both_stages_start_alike(
    model_folder: Path, tmp_path: Path, capsys
) -> None:
    data = tmp_path / "train.jsonl"
    rows = [{"prompt": f"What is {i} + 2?", "answer": str(i + 2)} for i in range(12)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    rewards = Path(__file__).parents[1] / "reward_functions.py"
    out = tmp_path / "run"
    command = ["train", "eapo", "--out", str(out), "--model.name", str(model_folder)]
    command += ["--data.train", str(data), "--data.max_prompt_tokens", "64"]
    command += ["--data.check_answers", "false", "--train.max_tokens_per_microbatch", "256"]
    command += ["--reward.functions", f"['{rewards}:even_length']", "--train.lr", "1e-3"]
    command += ["--rollout.prompts_per_step", "4", "--rollout.group_size", "4"]
    command += ["--rollout.max_completion_tokens", "12", "--max-steps", "2"]
    command += ["--prior_resampling.prior_steps", "3", "--log.completions_every", "1"]

    def run(*more: str) -> int:
        return exit_code(*command, "--no-supervise", "--resume", "auto", *more)

    assert run("--stop-after", "1") == 0  # in the middle of stage one
    assert not (out / "metrics.jsonl").exists()
    assert run() == 0
    stage, own = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (out / "prior", out)
    )
    assert [s["step"] for s in stage] == [1, 2, 3] and [s["step"] for s in own] == [1, 2]
    assert not any("prior_completions" in s for s in stage)
    assert all(s["prior_completions"] == 4 for s in own)
    # Both begin with the same weights, hence with the same fresh completions.
    first = [
        completions(folder / "completions/step_000001.parquet") for folder in (out / "prior", out)
    ]
    assert len(first[1]) == 12 and first[1] <= first[0]
    written = (out / "prior/checkpoints/step_3/hf/model.safetensors").stat().st_mtime_ns
    assert run("--max-steps", "3") == 0  # a finished prior is taken as it is
    assert (out / "prior/checkpoints/step_3/hf/model.safetensors").stat().st_mtime_ns == written
    assert "stage 1 of 2" in capsys.readouterr().out


def completions(table: Path) -> set[tuple[str, str]]:
    import pyarrow.parquet as pq

    rows = pq.read_table(table).to_pylist()
    return {(r["question_id"], r["completion"]) for r in rows if r["source"] == "fresh"}
