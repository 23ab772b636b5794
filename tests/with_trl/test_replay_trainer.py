"""ExGRPO's replay in TRL's trainer: what is stored, what is replayed, and what it weighs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

trl = pytest.importorskip("trl", reason="make test-adapters installs TRL")

from test_trl_adapter import make_trainer, relative  # noqa: E402

from exgrpo_fast.adapters.trl import STATE_FILE, ReplayGRPOTrainer, ReplaySettings  # noqa: E402
from exgrpo_fast.core.errors import UserError  # noqa: E402
from exgrpo_kernels.adapters.trl import FusedGRPOTrainer  # noqa: E402

ALWAYS = ReplaySettings(start_success_rate=None, experience_ratio=0.5)


def first_word_is_even(completions: list[str], **_) -> list[float]:
    firsts = [c.split()[0] if c.split() else "" for c in completions]
    return [float(w[:1] == "w" and int(w[1:]) % 2 == 0) for w in firsts]


def replay_trainer(out: Path, replay: ReplaySettings = ALWAYS, **settings) -> ReplayGRPOTrainer:
    defaults = {
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-3,
        "reward": first_word_is_even,
    }
    return make_trainer(ReplayGRPOTrainer, out, replay=replay, **(defaults | settings))


def recorded(trainer: ReplayGRPOTrainer) -> list[dict]:
    """Every generation batch from now on, with the rewards of its fresh completions."""
    batches: list[dict] = []
    original = trainer._generate_and_score_completions

    def record(inputs):
        batch = original(inputs)
        batches.append(dict(batch) | {"fresh_rewards": trainer._rewards})
        return batch

    trainer._generate_and_score_completions = record  # type: ignore[method-assign]
    return batches


def test_before_it_starts_training_is_that_of_the_fused_trainer(tmp_path: Path) -> None:
    ends = []
    for kind, extra in (
        (FusedGRPOTrainer, {}),
        (ReplayGRPOTrainer, {"replay": ReplaySettings(start_success_rate=1.0)}),
    ):
        trainer = make_trainer(kind, tmp_path, max_steps=4, reward=first_word_is_even, **extra)
        trainer.train()
        ends.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.equal(*ends)


def test_replayed_rows_are_stored_ones_with_their_log_probs(tmp_path: Path) -> None:
    trainer = replay_trainer(tmp_path, max_steps=8)
    batches = recorded(trainer)
    trainer.train()
    replayed = [b for b in batches if "shaping" in b]
    assert len(replayed) >= 5
    seen: set[tuple[int, ...]] = set()
    for batch in batches:
        mask = batch["completion_mask"].bool()
        rows = [
            tuple(ids[m].tolist()) for ids, m in zip(batch["completion_ids"], mask, strict=True)
        ]
        is_replayed = (batch["shaping"] > 0).tolist() if "shaping" in batch else [False] * 16
        for row, again in zip(rows, is_replayed, strict=True):
            assert not again or row in seen, "a replayed completion was never generated"
        seen |= {row for row, again in zip(rows, is_replayed, strict=True) if not again}
    batch = replayed[-1]
    assert batch["shaping"].unique().tolist() == pytest.approx([0.0, 0.1])
    assert batch["shaping"].gt(0).sum() <= 2  # of 4 groups at ratio 0.5
    assert batch["num_items_in_batch"] == batch["completion_mask"].sum()
    logs = trainer.state.log_history
    assert any(log.get("replay/frac", 0) == 0.5 for log in logs)


def test_advantages_count_the_replayed_reward(tmp_path: Path) -> None:
    trainer = replay_trainer(tmp_path, max_steps=8, scale_rewards="none")
    batches = recorded(trainer)
    trainer.train()
    batch = [b for b in batches if "shaping" in b][-1]
    rewards = torch.where(batch["shaping"] > 0, 1.0, batch["fresh_rewards"]).view(4, 4)
    expected = rewards - rewards.mean(1, keepdim=True)
    torch.testing.assert_close(batch["advantages"].view(4, 4), expected)


def test_the_shaped_gradient_is_that_of_the_formula(tmp_path: Path) -> None:
    """Autograd through plain log-softmax: w / (w + beta) on replayed rows, TRL's clip elsewhere."""
    trainer = replay_trainer(tmp_path, max_steps=6, loss_type="dapo")
    batches = recorded(trainer)
    trainer.train()
    batch = [b for b in batches if "shaping" in b][-1]
    batch.pop("fresh_rewards")
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    fused = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    trainer.model.zero_grad()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    width = batch["completion_ids"].size(1)
    logits = trainer.model(input_ids=ids, attention_mask=attention).logits[:, -width - 1 : -1]
    logp = torch.log_softmax(logits.float() / trainer.temperature, -1)
    logp = logp.gather(2, batch["completion_ids"][:, :, None]).squeeze(2)
    w = (logp - batch["old_per_token_logps"]).exp()
    advantages = batch["advantages"][:, None]
    clipped = -torch.min(w * advantages, w.clamp(0.8, 1.2) * advantages)
    shaped = -advantages * w / (w + 0.1)
    losses = torch.where(batch["shaping"][:, None] > 0, shaped, clipped)
    expected = (losses * batch["completion_mask"]).sum() / batch["completion_mask"].sum()
    expected.backward()
    plain = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert relative(fused, plain) < 1e-5


def test_the_chosen_completion_has_the_lowest_entropy(tmp_path: Path) -> None:
    trainer = replay_trainer(tmp_path, max_steps=8, learning_rate=0.0)
    batches = recorded(trainer)
    trainer.train()
    batch = [b for b in batches if "shaping" in b][-1]
    store = trainer.store
    (row, *_) = batch["shaping"].nonzero().flatten().tolist()
    length = int(batch["completion_mask"][row].sum())
    tokens = batch["completion_ids"][row][:length].tolist()
    rows = (store.rows["question"] >= 0).nonzero().flatten()
    kept = store.read(rows).cpu()
    texts = [piece.tolist() for piece in kept.tokens.split()]
    question = kept.question[texts.index(tokens)]
    of_question = kept.question == question
    # weights do not move: what was measured then holds now, for all that was a candidate
    scored = of_question & kept.entropy.isfinite()
    assert kept.entropy[texts.index(tokens)] == kept.entropy[scored].min()


def test_a_solved_question_is_not_asked_again(tmp_path: Path) -> None:
    trainer = replay_trainer(tmp_path)
    places = torch.tensor([0, 1])
    trainer._questions = [{"prompt": "w1"}, {"prompt": "w2"}]
    trainer._remember(None, torch.tensor([1.0] * 4 + [0.0, 1.0, 0.0, 0.0]), places, step=1)
    assert trainer.store.retired[:2].tolist() == [True, False]


def test_the_store_is_saved_and_resumed(tmp_path: Path) -> None:
    trainer = replay_trainer(tmp_path, max_steps=6, save_strategy="steps", save_steps=6)
    trainer.train()
    folder = tmp_path / "checkpoint-6"
    assert (folder / STATE_FILE).exists()
    again = replay_trainer(tmp_path, max_steps=8)
    loaded: list[tuple[torch.Tensor, int, list]] = []
    original = again._generate_and_score_completions

    def record(inputs):
        state = again.store.bucket.clone(), again.store.num_trajectories, list(again._questions)
        loaded.append(state)
        assert again.replay_active
        return original(inputs)

    again._generate_and_score_completions = record  # type: ignore[method-assign]
    again.train(resume_from_checkpoint=str(folder))
    bucket, num_trajectories, questions = loaded[0]
    assert torch.equal(bucket, trainer.store.bucket)
    assert num_trajectories == trainer.store.num_trajectories > 0
    assert questions == trainer._questions
    assert len(loaded) == 2


@pytest.mark.parametrize(
    ("settings", "words"), [({"beta": 0.05}, "KL term"), ({"num_generations": 1}, "below 2")]
)
def test_what_it_does_not_take_is_said_in_one_line(
    settings: dict, words: str, tmp_path: Path
) -> None:
    with pytest.raises((UserError, ValueError), match=f"{words}|generations"):
        replay_trainer(tmp_path, **settings)
