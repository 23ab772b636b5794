"""The adapter for verl against the installed verl: losses, head, plugin."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("verl", reason="make test-adapters installs verl")

from verl.trainer.ppo import core_algos  # noqa: E402
from verl.utils.experimental.torch_functional import (  # noqa: E402
    FusedLinearForPPO,
    FusedLinearForPPOFunction,
)
from verl.workers.config import ActorConfig  # noqa: E402

from exgrpo_kernels.adapters import AdapterError  # noqa: E402
from exgrpo_kernels.adapters import verl as adapter  # noqa: E402

MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"]


def actor_config(**settings) -> ActorConfig:
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=4,
        clip_ratio=0.2,
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
        **settings,
    )
    config.global_batch_info.update(dp_size=1, batch_num_tokens=23, global_batch_size=4)
    return config


def batch() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(7)
    log_prob = -3 * torch.rand(4, 6, generator=g)
    return {
        "old_log_prob": log_prob + 0.5 * torch.randn(4, 6, generator=g),
        "log_prob": log_prob,
        "advantages": torch.tensor([1.0, -0.5, -2.0, 0.3])[:, None].expand(4, 6),
        "response_mask": (torch.arange(6) < torch.tensor([6, 2, 5, 4])[:, None]).float(),
    }


def loss_and_gradient(name: str, mode: str, **extra) -> tuple[float, torch.Tensor]:
    inputs = batch() | extra
    inputs["log_prob"] = inputs["log_prob"].clone().requires_grad_()
    loss, _ = core_algos.get_policy_loss_fn(name)(
        **inputs, loss_agg_mode=mode, config=actor_config()
    )
    loss.backward()
    return loss.item(), inputs["log_prob"].grad


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("ours", "theirs"), [("exgrpo", "vanilla"), ("exgrpo_gspo", "gspo")])
def test_registered_losses_equal_verls(ours: str, theirs: str, mode: str) -> None:
    adapter.register_losses()
    expected, gradient = loss_and_gradient(theirs, mode)
    loss, made = loss_and_gradient(ours, mode)
    assert loss == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(made, gradient, rtol=1e-5, atol=1e-7)


def test_sapo_equals_verls_in_the_mode_that_verl_gives_it() -> None:
    adapter.register_losses()
    expected, gradient = loss_and_gradient("sapo", "seq-mean-token-mean")
    loss, made = loss_and_gradient("exgrpo_sapo", "seq-mean-token-mean")
    assert loss == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(made, gradient, rtol=1e-5, atol=1e-7)


def test_cispo_differs_from_verls_below_the_lower_bound_alone() -> None:
    """verl clips the detached ratio from below too; MiniMax-M1 eq. 4, as run, does not."""
    adapter.register_losses()
    _, theirs = loss_and_gradient("cispo", "token-mean")
    _, made = loss_and_gradient("exgrpo_cispo", "token-mean")
    inputs = batch()
    ratio = (inputs["log_prob"] - inputs["old_log_prob"]).exp()
    inside = (ratio >= 0.8) & (inputs["response_mask"] > 0)
    assert inside.any() and (~inside).any()
    torch.testing.assert_close(made[inside], theirs[inside], rtol=1e-5, atol=1e-7)
    below = (ratio < 0.8) & (inputs["response_mask"] > 0)
    torch.testing.assert_close(made[below] * 0.8 / ratio[below], theirs[below])


def test_rollout_correction_scales_the_loss() -> None:
    adapter.register_losses()
    correction = {"rollout_is_weights": torch.linspace(0, 2, 24).view(4, 6)}
    expected = loss_and_gradient("vanilla", "token-mean", **correction)
    made = loss_and_gradient("exgrpo", "token-mean", **correction)
    assert made[0] == pytest.approx(expected[0], rel=1e-6)
    torch.testing.assert_close(made[1], expected[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(7,), (2, 5)])
def test_the_head_equals_float64_and_is_undone(shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(*shape, 16, generator=g)
    weight = torch.randn(50, 16, generator=g)
    targets = torch.randint(50, shape, generator=g)
    upstream = torch.randn(2, *shape, generator=g)

    def run(function, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (hidden, weight)]
        logprobs, entropy = function(*leaves, targets, 0.7)
        ((logprobs * upstream[0]).sum() + (entropy * upstream[1]).sum()).backward()
        return [logprobs.detach(), entropy.detach(), *(leaf.grad for leaf in leaves)]

    def exact(hidden, weight, targets, temperature):
        logp = torch.log_softmax(hidden @ weight.t() / temperature, -1)
        return logp.gather(-1, targets[..., None]).squeeze(-1), -(logp.exp() * logp).sum(-1)

    original = FusedLinearForPPO.forward
    undo = adapter.use_fused_head()
    try:
        assert adapter.is_active()["head"]
        ours = run(FusedLinearForPPO(), torch.float32)
    finally:
        undo()
    assert FusedLinearForPPO.forward is original
    theirs = run(
        lambda h, w, t, tau: FusedLinearForPPOFunction.apply(h, w, t, tau, 4), torch.float32
    )
    for a, b, c in zip(ours, theirs, run(exact, torch.float64), strict=True):
        error, peer = ((a - c).abs().max().item(), (b - c).abs().max().item())
        assert error <= 2 * peer + 1e-6


def test_the_plugin_says_that_it_is_active(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = FusedLinearForPPO.forward
    monkeypatch.setattr(FusedLinearForPPO, "forward", original)
    monkeypatch.setenv("EXGRPO_VERL_HEAD", "1")
    with caplog.at_level(logging.WARNING):
        adapter.activate()
    assert adapter.is_active() == {"losses": True, "head": True}
    assert "exgrpo_kernels is active in verl: fused head and losses exgrpo" in caplog.text


def test_without_the_switch_the_head_is_verls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXGRPO_VERL_HEAD", raising=False)
    adapter.activate()
    assert adapter.is_active() == {"losses": True, "head": False}


def test_a_changed_head_is_an_error_that_names_what_was_expected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FusedLinearForPPO, "forward", lambda self, x: x)
    with pytest.raises(AdapterError, match="was expected to take hidden_states"):
        adapter.use_fused_head()


def test_clip_bounds_come_from_verl() -> None:
    config = SimpleNamespace(
        clip_ratio=0.1, clip_ratio_low=None, clip_ratio_high=0.3, get=lambda name, default: default
    )
    made = adapter.verl_objective(adapter.OBJECTIVES["exgrpo"], config)
    assert (made.clip_low, made.clip_high, made.dual_clip) == (0.1, 0.3, 3.0)


def test_diagnose_reads_what_verls_file_logger_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from verl.utils.tracking import FileLogger

    from exgrpo_fast.run.diagnosis.checks import diagnose
    from exgrpo_fast.run.diagnosis.logs import read_log

    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(tmp_path / "run.jsonl"))
    logger = FileLogger("project", "experiment")
    for step in range(12):
        data = {"critic/score/mean": 0.05 * step, "actor/entropy": 1.0, "actor/lr": 1e-6}
        logger.log(data | {"response_length/clip_ratio": 0.8}, step)
    logger.finish()
    log = read_log(tmp_path / "run.jsonl")
    assert (log.trainer, log.num_steps) == ("verl", 12)
    assert [finding.check for finding in diagnose(log)] == ["truncation"]
