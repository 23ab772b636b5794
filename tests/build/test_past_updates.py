"""`train --from-rollouts`: the saved steps of a run are trained on again, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REWARDS, exit_code
from safetensors.torch import load_file

from exgrpo_fast.training.saved_updates import read_update

STEPS = 4


def train(folder: Path, model: Path, recipe: str, *more: str) -> Path:
    rows = [{"id": f"sum{i}", "prompt": f"{i} + 1?", "answer": "3"} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = f"""
        --model.name {model} --data.train {folder / "rows.jsonl"} --data.check_answers false
        --reward.functions [{REWARDS}:even_length] --reward.workers 1
        --rollout.prompts_per_step 4 --rollout.group_size 4 --rollout.max_completion_tokens 8
        --train.max_steps {STEPS} --train.lr 1e-3 --checkpoint.every 2 --checkpoint.keep 9
        --train.minibatches 1 --log.updates true --no-supervise
    """.split()
    assert exit_code("train", recipe, "--out", folder / "run", *settings, *more) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_folder: Path) -> Path:
    """ExGRPO with a KL term; replayed trajectories from step 2 on, and no clip then."""
    more = ("--replay.start_success_rate", "0.0", "--algorithm.kl.coef", "0.01")
    return train(tmp_path_factory.mktemp("past"), model_folder, "exgrpo", *more)


def metrics(folder: Path) -> dict[int, dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {step["step"]: step for step in map(json.loads, lines)}


@pytest.fixture
def again(run: Path, tmp_path: Path) -> Callable[..., tuple[int, Path]]:
    def call(steps: str, *more: object) -> tuple[int, Path]:
        out = tmp_path / f"again{len(list(tmp_path.iterdir()))}"
        words = ["train", "--from-rollouts", run, "--steps", steps, "--out", out, *more]
        return exit_code(*words), out

    return call


@pytest.mark.parametrize("first", [1, 3])
def test_nothing_changed_is_the_run_bit_for_bit(run, again, first, capsys) -> None:
    code, out = again(f"{first}:{STEPS}")
    assert code == 0
    assert capsys.readouterr().out.count("the same as in the run") == STEPS - first + 1
    wanted, found = metrics(run), metrics(out)
    assert list(found) == list(range(first, STEPS + 1))
    for step, values in found.items():
        for name in ("loss_hex", "grad_norm", "lr", "tokens_trained"):
            assert values[name] == wanted[step][name], (step, name)
    ours = load_file(out / "hf" / "model.safetensors")
    theirs = load_file(run / "checkpoints" / f"step_{STEPS}" / "hf" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_steps_hold_replayed_trajectories_and_an_unclipped_loss(run) -> None:
    groups, objective = read_update(run / "updates", STEPS)
    sources = {t.source for group in groups for t in group.trajectories}
    assert sources == {"fresh", "replay"} and objective.clip_high is None
    assert read_update(run / "updates", 1)[1].clip_high == 0.2


def test_another_rate_or_loss_changes_what_follows(run, again) -> None:
    wanted = metrics(run)
    _, out = again(f"1:{STEPS}", "--train.lr", "1e-2")
    found = metrics(out)
    assert found[1]["loss_hex"] == wanted[1]["loss_hex"]  # of the weights before the update
    assert found[2]["loss_hex"] != wanted[2]["loss_hex"]
    assert found[1]["lr"] == 10 * wanted[1]["lr"]
    _, out = again("1:1", "--algorithm.kl.coef", "0", "--algorithm.advantage", "grpo")
    groups, _ = read_update(run / "updates", 1)
    total = 0.0
    for group in groups:  # Dr.GRPO's mean over sequences and the longest length, at a ratio of 1
        mean = sum(group.rewards) / len(group.rewards)
        std = (sum((r - mean) ** 2 for r in group.rewards) / len(group.rewards)) ** 0.5
        for t in group.trajectories:
            total -= (t.reward - mean) / std * t.num_tokens / (16 * 8) if std else 0.0
    assert metrics(out)[1]["loss"] == pytest.approx(total, abs=1e-6)


def test_distillation_is_the_run_bit_for_bit(tmp_path, model_folder) -> None:
    """The teacher's distributions are not saved: the teacher makes them again."""
    keys = {"teacher": model_folder, "divergence": "jsd", "rewards": "true"}
    words = [w for k, v in keys.items() for w in (f"--algorithm.distillation.{k}", str(v))]
    run, out = train(tmp_path, model_folder, "distillation", *words), tmp_path / "again"
    assert exit_code("train", "--from-rollouts", run, "--steps", "3:4", "--out", out) == 0
    wanted, found = metrics(run), metrics(out)
    assert wanted[4]["teacher_divergence"] > 0
    assert [found[s]["loss_hex"] for s in (3, 4)] == [wanted[s]["loss_hex"] for s in (3, 4)]
    assert found[4]["grad_norm"] == wanted[4]["grad_norm"] > 0


@pytest.mark.parametrize(
    ("steps", "more", "said"),
    [
        ("1:9", (), "step 5 was not kept; there are 1 to 4"),
        ("2:4", (), "no checkpoint of step 1; steps can begin with 1, 3, 5"),
        ("4:3", (), "4:3 is not FIRST:LAST"),
        ("1:2", ("--rollout.temperature", "0.5"), "rollout.temperature: it decided"),
        ("1:2", ("--train.seed", "5"), "train.seed: it decided"),
    ],
)
def test_what_cannot_be_trained_again_is_refused(again, capsys, steps, more, said) -> None:
    capsys.readouterr()
    code, out = again(steps, *more)
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "") and not out.exists()
    assert said in printed.err and printed.err.count("\n") == 1


def test_a_run_without_saved_updates_is_refused(run, tmp_path, capsys) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.yaml").write_text((run / "config.yaml").read_text())
    capsys.readouterr()
    words = ("--from-rollouts", tmp_path / "bare", "--steps", "1:2", "--out", tmp_path / "out")
    assert exit_code("train", *words) == 2
    assert "its log.updates has to be true" in capsys.readouterr().err
    assert exit_code("train", "exgrpo", *words) == 2
    assert "'exgrpo' is neither an option" in capsys.readouterr().err
    assert exit_code("train", "exgrpo", "--steps", "1:2") == 2
    assert "--steps goes with --from-rollouts" in capsys.readouterr().err
