"""The small optimiser states: what they learn, what they keep, what they refuse."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ScriptedEngine, make_questions
from pretend_gpu.machine import pretend_gpu
from torch import nn
from transformers import PreTrainedTokenizerFast

from exgrpo_fast.build.run import restore_run
from exgrpo_fast.config import Config, ConfigError, validate
from exgrpo_fast.run.checkpoint.format import Checkpoints, load_state
from exgrpo_fast.run.checkpoint.writer import CheckpointWriter
from exgrpo_fast.training.optim.adamw import (
    GROUP,
    OptimiserError,
    decode,
    flatten,
    make_adamw,
    restore,
)
from exgrpo_fast.training.optim.optimiser import Optimiser
from exgrpo_fast.training.trainer import Trainer


def needs(package: str) -> pytest.MarkDecorator:
    absent = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(absent, reason=f"needs {package}, of the extra `optim8`")


def weights(dtype: torch.dtype = torch.bfloat16, std: float = 0.02) -> list[nn.Parameter]:
    """A matrix whose moments are quantised, one too small for it, and a vector."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(96, 128), (3, 5), (7,)]
    return [
        nn.Parameter((std * torch.randn(shape, generator=generator)).to(dtype)) for shape in shapes
    ]


def give_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = (0.01 * torch.randn(p.shape, generator=generator)).to(p.dtype)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        (
            {"model": {"weights": "bfloat16"}, "train": {"optimizer": "adamw"}},
            "about 2 % of the weights would move.*flash_adamw keeps the lost bits",
        ),
        ({"train": {"optimizer": "flash_adamw"}}, "flash_adamw is for model.weights bfloat16"),
        (
            {"model": {"weights": "bfloat16", "lora": {}}, "train": {"optimizer": "flash_adamw"}},
            "flash_adamw is for model.weights bfloat16",
        ),
    ],
)
def test_configs_that_do_not_fit(sections: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        validate(sections)


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ({}, "adamw"),
        ({"lora": {}}, "adamw"),
        ({"lora": {}, "weights": "bfloat16"}, "adamw"),
        ({"weights": "bfloat16"}, "flash_adamw"),
    ],
)
def test_auto(model: dict[str, Any], kind: str) -> None:
    config: Config = validate({"model": model})
    assert config.optimizer == kind


SAME: dict[str, Any] = {"lr": 1e-6, "betas": (0.9, 0.999), "weight_decay": 0.0}


def test_plain_bfloat16_is_refused_for_the_reason_that_it_hardly_moves() -> None:
    """At 1e-6 torch's own AdamW moves about 2 % of bfloat16 weights of standard deviation 0.02."""
    with pytest.raises(OptimiserError, match="plain bfloat16 weights do not learn"):
        make_adamw("adamw", weights(), **SAME)
    (p, *_) = weights()
    before = p.detach().clone()
    give_gradients([p], 1)
    torch.optim.AdamW([p], **SAME).step()
    moved = float((p != before).float().mean())
    assert 0.01 < moved < 0.03


@needs("flashoptim")
def test_flash_adamw_is_for_cuda_and_bfloat16() -> None:
    with pytest.raises(OptimiserError, match="flash_adamw runs on a CUDA device only"):
        make_adamw("flash_adamw", weights(), **SAME)
    with pytest.raises(OptimiserError, match="flash_adamw is for model.weights bfloat16"):
        make_adamw("flash_adamw", weights(torch.float32), **SAME)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptimiserError, match="needs torchao: pip install 'exgrpo-fast.optim8.'"):
        make_adamw("adamw_8bit", weights(), **SAME)


# --- the residual of flash_adamw ---


def test_any_residual_goes_through_a_checkpoint(tmp_path: Path) -> None:
    """flashoptim views its 16 bits as bfloat16, where 256 of the 65,536 patterns are not finite."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    weight = nn.Parameter(torch.ones(2**16, dtype=torch.bfloat16))
    state = {0: {"step": torch.tensor(1.0), "error_bits": bits.view(torch.bfloat16)}}
    checkpoints = Checkpoints(tmp_path, keep=1)
    writer = CheckpointWriter(checkpoints, NoModel())
    path = writer.finish(1, {"learner": {"optimiser": {"moments": flatten(state)}}})

    optimiser = torch.optim.AdamW([weight])
    restore(optimiser, load_state(path)["learner"]["optimiser"]["moments"], [weight])
    assert torch.equal(optimiser.state[weight]["error_bits"].view(torch.int16), bits)


class NoModel:
    """A model folder without weights."""

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def write(self, folder: Path, tensors: Any) -> None:
        folder.mkdir(exist_ok=True)


# --- 8-bit moments --------------------------------------------------------------------------------


@needs("torchao")
def test_8_bit_moments_stay_close_to_torchs() -> None:
    """float32 weights: only the moments are rounded. A step is at most about lr."""
    ours, theirs = weights(torch.float32), weights(torch.float32)
    optimiser = Optimiser(ours, kind="adamw_8bit", lr=1e-3, weight_decay=0.0, max_grad_norm=1e9)
    reference = Optimiser(theirs, lr=1e-3, weight_decay=0.0, max_grad_norm=1e9)
    for seed in range(4):
        give_gradients(ours, seed)
        give_gradients(theirs, seed)
        optimiser.step()
        reference.step()
    way = (theirs[0] - weights(torch.float32)[0]).detach()
    error = (ours[0] - theirs[0]).detach()
    assert error.norm() < 0.05 * way.norm()
    assert (ours[2] - theirs[2]).abs().max() < 1e-7  # too small to be quantised


@needs("torchao")
def test_rounding_at_random_moves_bfloat16_weights_by_the_right_amount() -> None:
    """In the mean over a matrix; rounding to the nearest would stand still."""
    p = nn.Parameter(torch.full((256, 256), 0.02).bfloat16())
    before = float(p.detach().float().mean())
    optimiser = Optimiser([p], kind="adamw_8bit", lr=1e-6, weight_decay=0.0, max_grad_norm=1e9)
    for _ in range(8):
        p.grad = torch.full_like(p, 0.01)
        optimiser.step()
    moved = before - float(p.detach().float().mean())
    step = 2.0**-13  # of bfloat16 between 2^-6 and 2^-5
    noise = step * (8e-6 / step / 256**2) ** 0.5  # of a mean of so many draws
    assert abs(moved - 8e-6) < 4 * noise < 4e-6


@needs("torchao")
def test_the_state_goes_through_a_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    through, halves = weights(), weights()
    whole = Optimiser(through, kind="adamw_8bit", lr=1e-3)
    for seed in range(4):
        give_gradients(through, seed)
        whole.step()
    early = Optimiser(halves, kind="adamw_8bit", lr=1e-3)
    for seed in range(2):
        give_gradients(halves, seed)
        early.step()
    saved = Checkpoints(tmp_path).save(2, Path.mkdir, {"optimiser": early.state_dict()})
    late = Optimiser(halves, kind="adamw_8bit", lr=1e-3)
    torch.manual_seed(99)  # what is rounded at random does not hang on the process
    late.load_state_dict(load_state(saved)["optimiser"])
    for seed in range(2, 4):
        give_gradients(halves, seed)
        late.step()
    assert all(torch.equal(a, b) for a, b in zip(through, halves, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(through, weights(), strict=True))


@needs("torchao")
@pytest.mark.parametrize("bad", [float("nan"), 1e6])
def test_a_bad_gradient_changes_nothing(bad: float) -> None:
    parameters = weights()
    optimiser = Optimiser(parameters, kind="adamw_8bit", lr=1e-3)
    give_gradients(parameters, 0)
    optimiser.step()
    before = [p.detach().clone() for p in parameters]
    codes = optimiser.state_dict()["moments"]["0"]["exp_avg"]["quantised"]["codes"].clone()
    give_gradients(parameters, 1)
    assert parameters[0].grad is not None
    parameters[0].grad[0, 0] = bad
    assert optimiser.step().skipped is not None
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
    after = optimiser.state_dict()["moments"]["0"]["exp_avg"]["quantised"]["codes"]
    assert torch.equal(after, codes) and codes.unique().numel() > 50


@needs("flashoptim")
def test_flashoptims_state_goes_through_ours(tmp_path: Path) -> None:
    """Its CPU form, without residual and quantisation: the path of its state, not its kernels."""
    from flashoptim import FlashAdamW  # pyright: ignore[reportMissingImports]

    def make(parameters: list[nn.Parameter]) -> Any:
        return FlashAdamW(parameters, lr=1e-3, master_weight_bits=None, quantize=False, fused=False)

    through, halves = weights(torch.float32), weights(torch.float32)
    whole, early, late = make(through), make(halves), make(halves)
    for seed in range(4):
        give_gradients(through, seed)
        whole.step()
    for seed in range(2):
        give_gradients(halves, seed)
        early.step()
    saved = Checkpoints(tmp_path).save(2, Path.mkdir, {"m": flatten(early.state_dict()["state"])})
    restore(late, load_state(saved)["m"], halves)
    for seed in range(2, 4):
        give_gradients(halves, seed)
        late.step()
    assert all(torch.equal(a, b) for a, b in zip(through, halves, strict=True))


@needs("flashoptim")
def test_its_moments_are_decoded_as_it_decodes_them() -> None:
    from flashoptim import optimizers  # pyright: ignore[reportMissingImports]

    values = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    for signed in (True, False):
        form: dict[str, Any] = {"signed": signed, "sqrt": not signed, "softsign": signed}
        with pretend_gpu():
            given = (values if signed else values.square()).cuda()
            codes, scales = optimizers.quantize(given, **form)
            expected = optimizers.dequantize(codes, scales, **form).cpu()
            codes, scales = codes.cpu(), scales.cpu()
        found = decode(codes, scales[torch.arange(150) // GROUP])
        assert torch.allclose(found, expected, rtol=1e-6, atol=0.0) and found.std() > 0.5


@needs("torchao")
def test_a_run_with_bfloat16_weights_resumes_bit_for_bit(
    tokenizer: PreTrainedTokenizerFast, make_test_trainer: Callable[..., Trainer]
) -> None:
    questions = make_questions(tokenizer, ["a", "b", "c", "d"])

    def make(skip: int = 0) -> Trainer:
        engine = ScriptedEngine(tokenizer, questions)
        for _ in range(4 - skip):
            for question in questions:
                engine.expect(question.id, "right", "wrong", "wrong 3", "right 2")
        return make_test_trainer(
            questions,
            engine=engine,
            model={"weights": "bfloat16"},
            algorithm={"kl": {"coef": 0.1}},  # without it the loss says nothing of the weights
            train={"optimizer": "adamw_8bit", "lr": 1e-3, "max_tokens_per_microbatch": 256},
        )

    through = make()
    losses = [through.step()[1]["loss_hex"] for _ in range(4)]
    assert len(set(losses)) == 4
    first = make()
    for loss in losses[:2]:
        assert first.step()[1]["loss_hex"] == loss
    saved = first.save()
    second = make(skip=2)
    stored = load_weights(saved / "hf")
    second.learner.policy.model.load_state_dict(stored)
    restore_run(second, load_state(saved))
    assert [second.step()[1]["loss_hex"] for _ in range(2)] == losses[2:]
    assert {w.dtype for w in stored.values()} == {torch.bfloat16}


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")
