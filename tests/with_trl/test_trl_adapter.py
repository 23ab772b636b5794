"""The adapter for TRL against the installed TRL: head, loss, gradient, training."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch

trl = pytest.importorskip("trl", reason="make test-adapters installs TRL")

import trl.trainer.utils as trl_utils  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from exgrpo_kernels.adapters import AdapterError  # noqa: E402
from exgrpo_kernels.adapters import trl as adapter  # noqa: E402

WORDS = ["<pad>", "<eos>", *(f"w{i}" for i in range(95))]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def tiny_model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.mul_(3.0)  # far from uniform, so that clipping and entropy matter
    return model


def even_words(completions: list[str], **_) -> list[float]:
    counts = [sum(int(w[1:]) % 2 == 0 for w in c.split() if w[0] == "w") for c in completions]
    return [n / 8 for n in counts]


def save_tiny_model(out: Path) -> Path:
    folder = out / "model"
    if not folder.exists():
        tiny_model().save_pretrained(folder)
    return folder


def make_trainer(
    kind: type, out: Path, *, peft: bool = False, reward=even_words, replay=None, **settings
):
    defaults = {
        "output_dir": str(out),
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "model_init_kwargs": {"dtype": "float32"},
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "logging_strategy": "steps",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 5,
    }
    prompts = [f"w{i} w{i + 1} w{i + 2}"[: 5 + 3 * (i % 3)].strip() for i in range(1, 33)]
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    torch.manual_seed(3)
    trainer = kind(
        model=str(save_tiny_model(out)),  # TRL loads the reference policy from there
        reward_funcs=reward,
        args=trl.GRPOConfig(**(defaults | settings)),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer(),
        peft_config=lora if peft else None,
        **({} if replay is None else {"replay": replay}),
    )
    # `train()` sets it at the start of each window; the tests of one micro-batch do not train.
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def micro_batch(*, is_on_policy: bool, correction: bool = False) -> dict[str, torch.Tensor]:
    """Ragged prompts on the left and completions on the right, as TRL buffers them."""
    g = torch.Generator().manual_seed(11)
    batch, prompt, length = 4, 5, 7
    lengths = torch.tensor([7, 3, 1, 5])
    mask = (torch.arange(length) < lengths[:, None]).long()
    inputs = {
        "prompt_ids": torch.randint(2, len(WORDS), (batch, prompt), generator=g),
        "prompt_mask": (torch.arange(prompt) >= torch.tensor([0, 2, 4, 1])[:, None]).long(),
        "completion_ids": torch.randint(2, len(WORDS), (batch, length), generator=g),
        "completion_mask": mask,
        "advantages": torch.tensor([1.2, -0.7, 0.4, -0.9]),
        "num_items_in_batch": mask.sum(),
        "ref_per_token_logps": -6 * torch.rand(batch, length, generator=g),
    }
    if not is_on_policy:
        inputs["old_noise"] = 0.4 * torch.randn(batch, length, generator=g)
    if correction:
        inputs["importance_sampling_ratio"] = 2 * torch.rand(batch, length, generator=g)
    return inputs


def loss_and_gradient(trainer, inputs: dict) -> tuple[float, torch.Tensor]:
    inputs = dict(inputs)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    if (noise := inputs.pop("old_noise", None)) is not None:
        with torch.no_grad():
            now, _, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, mask, inputs["completion_ids"].size(1)
            )
        inputs["old_per_token_logps"] = now + noise
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    grads = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(grads)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo"]


@pytest.mark.parametrize("is_on_policy", [False, True], ids=["old-logps", "on-policy"])
@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradient_equal_trl(
    loss_type: str, level: str, beta: float, is_on_policy: bool, tmp_path: Path
) -> None:
    settings = {"loss_type": loss_type, "importance_sampling_level": level, "beta": beta}
    if loss_type == "cispo":
        settings["epsilon_high"] = 2.0
    inputs = micro_batch(is_on_policy=is_on_policy)
    expected, gradient = loss_and_gradient(
        make_trainer(trl.GRPOTrainer, tmp_path, **settings), inputs
    )
    trainer = make_trainer(adapter.FusedGRPOTrainer, tmp_path, **settings)
    loss, fused = loss_and_gradient(trainer, inputs)
    assert loss == pytest.approx(expected, abs=1e-6)
    assert relative(fused, gradient) < 1e-6
    falls_back = is_on_policy and level == "sequence" and beta > 0
    assert bool(trainer._reasons_said) == falls_back
    assert trainer._micro_batches_checked == (0 if falls_back else 1)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("is_on_policy", [False, True], ids=["old-logps", "on-policy"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo", "sapo"])
def test_vllm_correction_reaches_the_surrogate_alone(
    loss_type: str, is_on_policy: bool, level: str, tmp_path: Path
) -> None:
    inputs = micro_batch(is_on_policy=is_on_policy, correction=True)
    results = []
    for kind in (trl.GRPOTrainer, adapter.FusedGRPOTrainer):
        beta = 0.05 if level == "token" else 0.0
        settings = {"loss_type": loss_type, "beta": beta, "importance_sampling_level": level}
        if loss_type == "cispo":
            settings["epsilon_high"] = 2.0
        trainer = make_trainer(kind, tmp_path, **settings)
        trainer.use_vllm = True  # the loss reads it; no engine is started
        results.append(loss_and_gradient(trainer, inputs))
    (expected, gradient), (loss, fused) = results
    assert loss == pytest.approx(expected, abs=1e-6)
    assert relative(fused, gradient) < 1e-6


def test_tool_mask_and_token_advantages(tmp_path: Path) -> None:
    inputs = micro_batch(is_on_policy=False)
    inputs["tool_mask"] = torch.ones_like(inputs["completion_mask"])
    inputs["tool_mask"][:, 1] = 0
    inputs["advantages"] = torch.linspace(-1, 1, 28).view(4, 7)
    results = [
        loss_and_gradient(make_trainer(kind, tmp_path), inputs)
        for kind in (trl.GRPOTrainer, adapter.FusedGRPOTrainer)
    ]
    assert results[1][0] == pytest.approx(results[0][0], abs=1e-6)
    assert relative(results[1][1], results[0][1]) < 1e-6


def test_lora_gives_the_head_no_gradient_and_equals_trl(tmp_path: Path) -> None:
    inputs = micro_batch(is_on_policy=False)
    results = [
        loss_and_gradient(make_trainer(kind, tmp_path, peft=True), inputs)
        for kind in (trl.GRPOTrainer, adapter.FusedGRPOTrainer)
    ]
    assert results[1][0] == pytest.approx(results[0][0], abs=1e-6)
    assert relative(results[1][1], results[0][1]) < 2e-6


def test_a_batch_without_completion_tokens_is_a_differentiable_zero(tmp_path: Path) -> None:
    inputs = micro_batch(is_on_policy=False)
    inputs["completion_mask"] = torch.zeros_like(inputs["completion_mask"])
    loss, gradient = loss_and_gradient(make_trainer(adapter.FusedGRPOTrainer, tmp_path), inputs)
    assert loss == 0.0
    assert gradient.abs().max() == 0.0


ON_OLD_ROLLOUTS = {"gradient_accumulation_steps": 2, "num_iterations": 2}
TEN_STEPS = [
    {},
    {"beta": 0.05},
    ON_OLD_ROLLOUTS,
    {"optim": "sgd", "learning_rate": 1.0, "gradient_accumulation_steps": 4, "beta": 0.05},
    {"peft": True},
    {"peft": True, "beta": 0.05, **ON_OLD_ROLLOUTS},
    *(
        {
            "loss_type": loss_type,
            "importance_sampling_level": level,
            "beta": beta,
            "num_iterations": 2,
            **({"epsilon_high": 2.0} if loss_type == "cispo" else {}),
        }
        for loss_type in LOSS_TYPES
        for level, beta in (("token", 0.05), ("sequence", 0.0))
    ),
]


@pytest.mark.parametrize("settings", TEN_STEPS, ids=lambda s: "-".join(map(str, s.values())))
def test_ten_steps_end_at_the_same_weights(settings: dict, tmp_path: Path) -> None:
    """To 1e-6 of the weights' norm. Log-probs are float32 in both, whatever the weights are, and
    AdamW divides a gradient by its own size: of what the steps have moved, 2e-5 may be apart."""
    ends = []
    for kind in (trl.GRPOTrainer, adapter.FusedGRPOTrainer):
        trainer = make_trainer(kind, tmp_path, max_steps=10, **settings)
        before = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
        after = trainer.model.state_dict()
        assert not getattr(trainer, "_reasons_said", None), "left to TRL's own loss"
        weights = torch.cat([weight.flatten() for weight in after.values()])
        moved = torch.cat([(after[n] - before[n]).flatten() for n in after])
        logs = [log for log in trainer.state.log_history if "entropy" in log]
        ends.append(
            (weights, moved, [log["loss"] for log in logs], [log["entropy"] for log in logs])
        )
    expected, ours = ends
    assert expected[1].norm() > 1e-2
    assert relative(ours[0], expected[0]) < 1e-6
    assert relative(ours[1], expected[1]) < 2e-5
    assert ours[2] == pytest.approx(expected[2], rel=1e-5, abs=1e-6)
    assert ours[3] == pytest.approx(expected[3], rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"delta": 4.0},
        {"top_entropy_quantile": 0.2},
        {"off_policy_mask_threshold": 0.5},
        {"loss_type": "vespo"},
        {"entropy_coef": 0.01},
    ],
)
def test_what_it_cannot_say_is_trls_own_and_said_once(settings: dict, tmp_path: Path) -> None:
    inputs = micro_batch(is_on_policy=False)
    expected = loss_and_gradient(make_trainer(trl.GRPOTrainer, tmp_path, **settings), inputs)
    trainer = make_trainer(adapter.FusedGRPOTrainer, tmp_path, **settings)
    with pytest.warns(UserWarning, match="to TRL's own loss"):
        loss, gradient = loss_and_gradient(trainer, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loss_and_gradient(trainer, inputs)
    assert loss == expected[0]
    assert torch.equal(gradient, expected[1])


def test_a_changed_loss_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(adapter.FusedGRPOTrainer, tmp_path)
    monkeypatch.setattr(trainer, "epsilon_low", 0.01)
    objective = trainer.fused_objective(is_on_policy=False)
    monkeypatch.setattr(trainer, "epsilon_low", 0.9)
    monkeypatch.setattr(trainer, "fused_objective", lambda is_on_policy: objective)
    with pytest.raises(AdapterError, match="differs by .* from TRL's own"):
        loss_and_gradient(trainer, micro_batch(is_on_policy=False))


# ---- the head alone -------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_head_equals_trls(cap: float | None, scale: float, has_bias: bool) -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 16, generator=g, dtype=torch.float32)
    weight, bias = torch.randn(50, 16, generator=g), torch.randn(50, generator=g)
    targets = torch.randint(50, (9,), generator=g)
    upstream = torch.randn(2, 9, generator=g)
    results = []
    for head in (trl_utils._ChunkedLogProbFunction, adapter.LogprobHead(None)):  # type: ignore[arg-type]
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        operands = leaves[0], leaves[1], leaves[2] if has_bias else None
        logprobs, entropy, *_ = head.apply(
            *operands, targets, 0.7, 32, cap, scale, ("log_probs", "entropy")
        )
        (logprobs @ upstream[0] + entropy @ upstream[1]).backward()
        results.append([logprobs.detach(), entropy.detach(), *(t.grad for t in leaves)])
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def test_use_fused_head_serves_sft_and_is_undone(tmp_path: Path) -> None:
    original = trl_utils._ChunkedLogProbFunction
    inputs = micro_batch(is_on_policy=False)
    expected, gradient = loss_and_gradient(make_trainer(trl.GRPOTrainer, tmp_path), inputs)
    undo = adapter.use_fused_head()
    assert adapter.use_fused_head() is not undo  # a second call changes nothing
    try:
        loss, fused = loss_and_gradient(make_trainer(trl.GRPOTrainer, tmp_path), inputs)
    finally:
        undo()
    assert trl_utils._ChunkedLogProbFunction is original
    assert loss == pytest.approx(expected, abs=1e-6)
    assert relative(fused, gradient) < 1e-6


def test_outputs_that_ours_lacks_are_trls() -> None:
    hidden, weight = torch.randn(3, 8), torch.randn(20, 8)
    targets = torch.tensor([1, 2, 3])
    arguments = (hidden, weight, None, targets, 1.0, 32, None, 1.0, ("log_probs", "is_top1"))
    head = adapter.LogprobHead(trl_utils._ChunkedLogProbFunction)
    for ours, theirs in zip(head.apply(*arguments), head.original.apply(*arguments), strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def test_bfloat16_autocast_trains(tmp_path: Path) -> None:
    inputs = micro_batch(is_on_policy=False)
    results = [
        loss_and_gradient(make_trainer(kind, tmp_path, bf16=True), inputs)
        for kind in (trl.GRPOTrainer, adapter.FusedGRPOTrainer)
    ]
    assert results[1][0] == pytest.approx(results[0][0], abs=2e-2)
    assert relative(results[1][1], results[0][1]) < 5e-2


def test_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "TESTED", "0.0.1")
    with pytest.warns(UserWarning, match=r"tested with trl 0\.0\.1; 1\.16"):
        adapter.use_fused_head()()


def test_a_changed_signature_names_what_was_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight):  # type: ignore[override]
            return hidden

    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Other)
    with pytest.raises(AdapterError, match="was expected to take hidden, weight, bias"):
        adapter.use_fused_head()
