"""What keeps a bad batch, or too large a one, away from the weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_questions, terms_of
from safetensors.torch import load_file
from test_learner import assert_same, collect, moments, questions_of, weights, with_rewards

from exgrpo_fast.model import policy as policy_module
from exgrpo_fast.model.oom import OutOfMemory
from exgrpo_fast.run.checkpoint.format import split_tensors
from exgrpo_fast.training.saved_updates import BadBatches
from exgrpo_fast.training.update_stats import RefusedUpdate

# --- a refused batch is kept for study -----------------------------------------------------------


def test_a_refused_batch_is_kept(tokenizer, make_test_trainer) -> None:
    trainer = make_test_trainer(
        questions_of(tokenizer), function="even_length", train={"skip_grad_norm": 1e-9}
    )
    before = weights(trainer)
    batch, metrics = trainer.step()
    assert_same(weights(trainer), before)
    assert moments(trainer) == {}
    folder = trainer.bad_batches.folder
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step_1.0.json", "step_1.0.safetensors"]
    said = json.loads((folder / names[0]).read_text())
    assert (said["step"], said["reason"]) == (1, "update_gradient_too_large")
    assert said["grad_norm"] == metrics["grad_norm"]
    rows = [row for row in terms_of(trainer, batch.groups) if row.advantage]
    columns = load_file(folder / names[1])
    assert columns["lengths"].tolist() == [row.trajectory.num_tokens for row in rows]
    assert columns["advantages"].tolist() == pytest.approx([row.advantage for row in rows])
    tokens = torch.cat([row.trajectory.token_ids for row in rows])
    logprobs = torch.cat([row.trajectory.behaviour_logprobs for row in rows])
    assert torch.equal(columns["token_ids"], tokens)
    assert torch.equal(columns["behaviour_logprobs"], logprobs)
    assert [row["question_id"] for row in said["rows"]] == [r.trajectory.question.id for r in rows]


def test_a_nan_is_kept_as_it_was(tokenizer, make_test_trainer) -> None:
    trainer = make_test_trainer(questions_of(tokenizer), function="even_length")
    groups = [with_rewards(trainer, group, [1.0, 0.0, 1.0, 0.0]) for group in collect(trainer)]
    first = groups[0].trajectories[0]
    broken = replace(first, behaviour_logprobs=first.behaviour_logprobs * float("nan"))
    groups[0] = replace(groups[0], trajectories=(broken, *groups[0].trajectories[1:]))
    report = trainer.learner.update(groups, trainer.objective)
    [refused] = report.refused
    assert refused.reason == "update_not_finite" and len(refused.terms) == 16
    trainer.bad_batches.write(7, report.refused)
    columns = load_file(trainer.bad_batches.folder / "step_7.0.safetensors")
    assert columns["behaviour_logprobs"].isnan().sum() == first.num_tokens


def test_only_the_first_refused_batches_are_kept(tmp_path: Path, tokenizer, make_test_trainer):
    trainer = make_test_trainer(questions_of(tokenizer), function="even_length")
    rows = terms_of(trainer, collect(trainer))
    kept = BadBatches(tmp_path / "bad")
    for step in range(kept.MAX_KEPT + 3):
        kept.write(step, [RefusedUpdate("update_not_finite", rows, None)])
    assert len(list(kept.folder.iterdir())) == 2 * kept.MAX_KEPT
    assert not (kept.folder / f"step_{kept.MAX_KEPT}.0.json").exists()


def test_a_disk_that_refuses_the_batch_ends_nothing(tmp_path: Path, caplog) -> None:
    (tmp_path / "file").write_text("")
    BadBatches(tmp_path / "file" / "bad").write(1, [RefusedUpdate("x", [], None)])
    assert "a refused batch is not kept" in caplog.text


# --- out of memory --------------------------------------------------------------------------------


class Device:
    """Stands before the policy's forward and is out of memory for packs above `limit` tokens, in
    the update or in scoring."""

    def __init__(self, policy, limit: int, *, scoring: bool = False) -> None:
        self.forward, self.limit, self.refused = policy.hidden_states, limit, 0
        self.scoring = scoring
        policy.hidden_states = self

    def __call__(self, packed) -> Any:
        is_scoring = not torch.is_grad_enabled()
        if is_scoring == self.scoring and len(packed.input_ids) > self.limit:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")
        return self.forward(packed)


@pytest.fixture
def make(tokenizer, make_test_trainer):
    def make_one(*, algorithm: dict[str, Any] | None = None, **train: Any):
        questions = make_questions(tokenizer, [f"q{i}" for i in range(8)])
        sizes = {"lr": 1e-3, "max_tokens_per_microbatch": 4096}
        more = {"train": sizes | train, "algorithm": algorithm or {}}
        more["rollout"] = {"scoring": "always"}
        return make_test_trainer(questions, function="even_length", **more)

    return make_one


@pytest.mark.parametrize("limit", [150, 60, 31])
def test_out_of_memory_does_the_same_batch_again_in_smaller_pieces(make, limit: int) -> None:
    plain = make()
    expected = [plain.step()[1] for _ in range(3)]
    trainer = make()
    device = Device(trainer.learner.policy, limit)
    found = [trainer.step()[1] for _ in range(3)]
    halvings = [row["microbatch_halvings"] for row in found]
    assert 1 <= halvings[0] <= 4 and halvings[1:] == [0, 0], "the size was not remembered"
    assert device.refused == halvings[0] + found[0]["chunk_halvings"] == halvings[0] + 1
    assert [row["chunk_halvings"] for row in found[1:]] == [0, 0]
    assert trainer.learner.policy.max_tokens_per_microbatch <= limit
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("loss", "grad_norm", "ratio_max", "entropy_mean"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=1e-6), name
        assert ours["tokens_trained"] == theirs["tokens_trained"] > 0
        assert ours["num_trained"] == theirs["num_trained"]
    for name, weight in weights(plain).items():
        assert torch.allclose(weights(trainer)[name], weight, atol=5e-5), name


@pytest.mark.parametrize("limit", [150, 60, 31])
def test_scoring_does_its_sequences_again_in_smaller_pieces(make, limit: int) -> None:
    plain = make()
    expected = [plain.step() for _ in range(3)]
    trainer = make()
    device = Device(trainer.learner.policy, limit, scoring=True)
    found = [trainer.step() for _ in range(3)]
    halvings = [row["microbatch_halvings"] for _, row in found]
    assert 1 <= halvings[0] <= 4 and halvings[1:] == [0, 0], "the size was not remembered"
    assert [row["chunk_halvings"] for _, row in found] == [1, 0, 0]
    assert device.refused == halvings[0] + 1
    assert trainer.learner.policy.max_tokens_per_microbatch <= limit
    (ours, _), (theirs, _) = found[0], expected[0]
    for mine, other in zip(trajectories_of(ours), trajectories_of(theirs), strict=True):
        assert torch.equal(mine.token_ids, other.token_ids)
        for name in ("behaviour_logprobs", "entropies"):
            pair = getattr(mine, name), getattr(other, name)
            torch.testing.assert_close(*pair, atol=1e-6, rtol=1e-6)
    for (_, ours), (_, theirs) in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-4, abs=1e-6)
        assert ours["tokens_trained"] == theirs["tokens_trained"] > 0


def trajectories_of(batch) -> list[Any]:
    return [t for group in batch.groups for t in group.trajectories]


def test_chunks_of_logits_give_way_before_packs(make, monkeypatch) -> None:
    """Packs of the asked size fit, only the logits of a whole one do not."""
    trainer = make()
    policy, score = trainer.learner.policy, policy_module.linear_logprob
    most, seen = policy.chunk_rows(), []

    def too_many(*arguments: Any, chunk_rows: int | None, **options: Any) -> Any:
        seen.append(chunk_rows)
        if chunk_rows is None or chunk_rows > most // 2:
            raise torch.OutOfMemoryError("out of memory")
        return score(*arguments, chunk_rows=chunk_rows, **options)

    monkeypatch.setattr(policy_module, "linear_logprob", too_many)
    _, metrics = trainer.step()
    assert seen == [None, most // 2]
    assert (metrics["chunk_halvings"], metrics["microbatch_halvings"]) == (1, 0)
    assert policy.max_tokens_per_microbatch == 4096


def test_the_reference_of_the_kl_term_gives_way_too(make) -> None:
    """It is another model on the same device: what fits it is what the policy takes as well."""
    plain, trainer = (make(algorithm={"kl": {"coef": 0.1}}) for _ in range(2))
    device = Device(trainer.learner.reference.base, 60, scoring=True)
    ours, theirs = trainer.step()[1], plain.step()[1]
    halvings = ours["chunk_halvings"] + ours["microbatch_halvings"]
    assert device.refused == halvings >= 2
    assert trainer.learner.policy.max_tokens_per_microbatch <= 60
    for name in ("loss", "grad_norm", "kl_ref"):
        assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=1e-6), name


def test_generation_is_done_again_in_halves(make, monkeypatch) -> None:
    # the model's own forward pass draws, which sees every row
    monkeypatch.setattr("exgrpo_fast.rollout.hf.engine.can_be_decoded", lambda *_: False)
    plain, trainer = make(), make()
    model, refused = trainer.learner.policy.model, []

    def check(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        if len(named["input_ids"]) > 5:
            refused.append(len(named["input_ids"]))
            raise torch.OutOfMemoryError("out of memory")

    model.register_forward_pre_hook(check, with_kwargs=True)
    for step in range(3):
        (ours, found), (theirs, expected) = trainer.step(), plain.step()
        assert found["generation_halvings"] == (2 if step == 0 else 0)
        assert expected["generation_halvings"] == 0
        for mine, other in zip(trajectories_of(ours), trajectories_of(theirs), strict=True):
            assert torch.equal(mine.token_ids, other.token_ids)
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert len(refused) == 2  # batches of 16 and 8
    assert found["chunk_halvings"] == found["microbatch_halvings"] == 0


def test_memory_that_runs_out_in_the_middle_leaves_no_gradient_behind(make) -> None:
    """Half of the batch is in the gradients when the second pack does not fit."""
    plain, trainer = (make(max_tokens_per_microbatch=128) for _ in range(2))
    groups = [with_rewards(plain, group, [1.0, 0.0, 1.0, 0.0]) for group in collect(plain)]
    policy = trainer.learner.policy
    forward, calls = policy.hidden_states, []

    def second_fails(packed):
        calls.append(len(packed.input_ids))
        if len(calls) in (2, 4):
            raise torch.OutOfMemoryError("out of memory")
        return forward(packed)

    expected = plain.learner.update(groups, plain.objective)
    policy.hidden_states = second_fails
    report = trainer.learner.update(groups, trainer.objective)
    assert len(calls) > 5 and (report.chunk_halvings, report.microbatch_halvings) == (1, 1)
    assert report.tokens_trained == expected.tokens_trained
    assert report.loss == pytest.approx(expected.loss, abs=1e-7)
    assert report.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)


@pytest.mark.parametrize("scoring", [False, True])
def test_where_not_one_sequence_fits_the_run_ends_with_a_table(make, scoring: bool) -> None:
    trainer = make()
    before = weights(trainer)
    Device(trainer.learner.policy, 4, scoring=scoring)
    with pytest.raises(OutOfMemory) as caught:
        trainer.step()
    where = "scoring" if scoring else "the update"
    assert str(caught.value).startswith(f"out of memory in {where}: not even one sequence of")
    assert "rollout.max_completion_tokens" in str(caught.value)
    rows = [line.split() for line in caught.value.table.splitlines()]
    gradients = [] if scoring else ["gradients"]
    assert [row[0] for row in rows[1:]] == ["weights", *gradients, "two", "one", "the"]
    assert "Tried to allocate 2.00 GiB." in caught.value.table
    assert_same(weights(trainer), before)
    assert all(p.grad is None for p in trainer.learner.policy.trainable_parameters)


@pytest.mark.parametrize("scoring", [False, True])
def test_the_size_that_fits_is_taken_up_unless_the_user_sets_another(make, scoring) -> None:
    first = make()
    Device(first.learner.policy, 60, scoring=scoring)
    first.step()
    fitting = first.learner.policy.max_tokens_per_microbatch
    state = first.state_dict()
    assert split_tensors(state)[0]["learner"]["microbatch"] == [4096, fitting]
    halved = first.learner.policy.sizes.chunk_rows
    assert state["learner"]["chunk_rows"] == [None, halved] and halved > 0
    again, other = make(), make(max_tokens_per_microbatch=2048)
    again.load_state_dict(state)
    other.load_state_dict(state)
    assert again.learner.policy.max_tokens_per_microbatch == fitting < 60
    assert again.learner.policy.sizes.chunk_rows == other.learner.policy.sizes.chunk_rows == halved
    assert other.learner.policy.max_tokens_per_microbatch == 2048
