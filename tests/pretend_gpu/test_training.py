"""The real command on the pretend GPU, from the memory plan to the report."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REWARDS
from interpreter import make_libdevice, prepare_interpreter
from pretend_gpu.machine import pretend_gpu

from exgrpo_fast.cli import main
from exgrpo_fast.config.load import recipe_names
from exgrpo_kernels import runtime

prepare_interpreter()

SMALL = """--data.check_answers false --data.max_prompt_tokens 64 --reward.workers 1
 --rollout.engine transformers --rollout.prompts_per_step 4 --rollout.group_size 4
 --rollout.max_completion_tokens 6 --replay.start_success_rate null --train.lr 1e-3
 --train.max_tokens_per_microbatch 160 --checkpoint.every 2 --eval.n 2 --eval.k [1,2] --eval.every 2
 --max-steps 2""".split()
LONG_ENOUGH = ["--rollout.max_completion_tokens", "8"]  # for the worked solutions of the rows
# name -> recipe and what it needs beside SMALL; "{model}" is the folder of the random policy
RECIPES: dict[str, list[str]] = {
    "exgrpo": ["exgrpo"],
    "grpo with KL and adapters": [
        *("grpo", "--algorithm.kl.coef", "0.01", "--model.lora", "{rank: 4}"),
    ],
    "dr_grpo, deterministic": ["dr_grpo", "--deterministic"],
    "gspo": ["exgrpo", "--algorithm.ratio_level", "sequence"],
    "dapo": [
        *("dapo", "--algorithm.overlong.soft_penalty_tokens", "4"),
        *("--rollout.dynamic_sampling.max_extra_batches", "1"),
        *("--algorithm.entropy_coef", "0.01"),
    ],
    "eapo": ["eapo", "--prior_resampling.model", "{model}"],
    "fifo": ["fifo"],
    "herl": ["herl", "--hindsight.max_prompt_tokens", "100"],
    "herl-naive": ["herl-naive", "--hindsight.max_prompt_tokens", "100"],
    "luffy": ["luffy", *LONG_ENOUGH],
    "prompt-replay": ["prompt-replay"],
    "remix, sparse backward": ["remix", "--train.sparsity", "1e-4"],
    "replay-groups": ["replay-groups"],
    "repo": ["repo"],
    "rlep": [
        *("rlep", *LONG_ENOUGH, "--train.minibatches", "2"),
        *("--algorithm.overlong.soft_penalty_tokens", "4"),
        *("--replay.store.pool", "null", "--replay.store.pool_field", "solution"),
    ],
    "tiles, activations on the host": [
        *("exgrpo", "--model.tile_tokens", "32", "--model.offload_activations", "true"),
    ],
    "gradients released": [
        *("exgrpo", "--train.gradient_release", "true", "--model.tile_tokens", "64"),
        *("--train.max_tokens_per_microbatch", "450", "--train.minibatches", "1"),
    ],
    "bfloat16 weights": ["exgrpo", "--model.weights", "bfloat16"],
    "clip-cov": ["clip-cov", "--algorithm.tokens.clip_cov", "0.05", "--train.minibatches", "2"],
    "distillation": ["distillation", "--algorithm.distillation.teacher", "{model}"],
    "distillation over the vocabulary": [
        *("distillation", "--algorithm.distillation.teacher", "{model}"),
        *("--algorithm.distillation.divergence", "reverse"),
    ],
    "dppo": ["dppo"],
    "entropy-advantage": ["entropy-advantage"],
    "exgrpo-questions-only": ["exgrpo-questions-only"],
    "high-entropy": ["high-entropy", "--train.minibatches", "2"],
    "kl-cov": ["kl-cov", "--algorithm.tokens.kl_cov", "0.05", "--train.minibatches", "2"],
    "qae": ["qae"],
}
NEEDS = {"bfloat16 weights": "flashoptim"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the data is; `auto` looks at the tiles of the small vocabulary."""
    monkeypatch.setattr(runtime, "SPARSE_VOCABULARY", 256)
    for name, term, count in (("train", 1, 8), ("eval", 2, 3)):
        row = {"answer": "3", "solution": "<answer>3</answer>"}
        rows = [{"prompt": f"{i} + {term}?", **row} for i in range(count)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return tmp_path


def train(device: str, folder: Path, model: Path, words: list[str]) -> list[dict[str, Any]]:
    """Run `exgrpo-fast train`; the metrics of its steps."""
    out = folder / f"{device}-{words[0]}"
    data = ["--data.train", f"{folder}/train.jsonl", "--data.eval", f"{folder}/eval.jsonl"]
    reward = ["--reward.functions", f"[{REWARDS}:even_length]", "--model.name", str(model)]
    rest = ["--out", str(out), "--device", device, "--no-supervise"]
    recipe, *options = [word.replace("{model}", str(model)) for word in words]
    try:
        code = main(["train", recipe, *data, *reward, *SMALL, *options, *rest])
    except SystemExit as end:
        code = end.code
    finally:
        torch.use_deterministic_algorithms(False)
    assert not code and (out / "report.html").exists()
    assert (out / "checkpoints" / "step_2").is_dir()
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def make_interpretable(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashoptim import optimizers  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(optimizers, "libdevice", make_libdevice())


def test_float32_trains_as_on_the_cpu(folder: Path, model_folder: Path) -> None:
    words = ["exgrpo", "--model.dtype", "float32"]
    expected = train("cpu", folder, model_folder, words)
    with pretend_gpu():
        found = train("cuda", folder, model_folder, words)
    losses = [
        [float.fromhex(row["loss_hex"]) for row in rows if "loss_hex" in row]
        for rows in (found, expected)
    ]
    assert len(losses[1]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-6)
    for name in ("reward_mean", "completion_len_mean", "replay_frac", "replay_trajectories"):
        assert name in expected[-1]
        assert [r.get(name) for r in found] == [r.get(name) for r in expected], name


def test_every_shipped_recipe_is_tried() -> None:
    """Those with a model of their own are recipes of this list with other sizes."""
    own_models = ("quickstart", "smollm2")
    shipped = {n for n in recipe_names() if not n.startswith(own_models)}
    assert shipped == {words[0] for words in RECIPES.values()}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_reach_their_report(
    name: str, folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in NEEDS:
        if importlib.util.find_spec(NEEDS[name]) is None:
            pytest.skip(f"needs {NEEDS[name]}, of the extra `optim8`")
        make_interpretable(monkeypatch)
    with pretend_gpu():
        train("cuda", folder, model_folder, RECIPES[name])
