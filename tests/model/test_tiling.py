"""Over tiles of tokens: the same function, the same gradients, less memory, no other name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_questions, peak_bytes
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from exgrpo_fast.memory.tracing import Setting, Tracer
from exgrpo_fast.memory.trainer_memory import Head, PackShape, states, update
from exgrpo_fast.model.lora import add_adapter
from exgrpo_fast.model.policy import Policy, PolicyError
from exgrpo_fast.model.tiling import decoder_layers, run_in_tiles, run_tiled
from exgrpo_fast.run.checkpoint.format import load_state
from exgrpo_fast.training.batch import WeightRule
from exgrpo_fast.training.learner import Learner
from exgrpo_fast.training.optim.optimiser import Optimiser
from exgrpo_fast.training.preflight import worst_groups
from exgrpo_kernels import PolicyObjective

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
}
SHAPES: dict[str, Any] = {
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "llama with biases": LlamaConfig(**SMALL, mlp_bias=True),
    "mistral": MistralConfig(**SMALL),
    "gemma2": Gemma2Config(**SMALL, attn_logit_softcapping=None),
    "phi3": Phi3Config(**SMALL),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0),
}
TOKENS = 50
# one row a tile, a ragged last tile, all tiles full, one tile
TILES = [1, 16, 25, 49, 50, 64]


def make(shape: str, *, dtype: torch.dtype = torch.float64, checkpointing: bool = False) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=dtype)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def gradients(model: Any, autocast: bool = False) -> dict[str, Tensor]:
    """Of a fixed linear function of the hidden states; all in float64."""
    torch.manual_seed(1)
    ids, weights = torch.randint(64, (1, TOKENS)), torch.randn(1, TOKENS, 32, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    (hidden.double() * weights).sum().backward()
    named = model.named_parameters()
    return {name: p.grad.double() for name, p in named if p.grad is not None}


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Of all gradients together, relative."""
    assert ours.keys() == theirs.keys()
    gaps = sum(float((ours[n] - theirs[n]).square().sum()) for n in ours)
    return (gaps / sum(float(t.square().sum()) for t in theirs.values())) ** 0.5


# --- the same function ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_an_mlp_in_float64(shape: str) -> None:
    mlp: Any = decoder_layers(make(shape))[0].mlp
    x, weights = torch.randn(2, 2, TOKENS // 2, 32, dtype=torch.float64)

    def run(call: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        mlp.zero_grad()
        given = x.clone().requires_grad_()
        out = call(given)
        (out * weights).sum().backward()
        return {"out": out, "x": given.grad} | {n: p.grad for n, p in mlp.named_parameters()}

    plain = run(mlp)
    assert len(plain) >= 4
    for tile in TILES:
        tiled = run(lambda given, tile=tile: run_tiled(mlp, mlp.forward, tile, given))
        for name, value in plain.items():
            assert torch.allclose(tiled[name], value, rtol=1e-12, atol=1e-12), (name, tile)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_a_model(shape: str, checkpointing: bool) -> None:
    """In float64 but for what its norms round to float32."""
    plain = gradients(make(shape, checkpointing=checkpointing))
    for tile in TILES:
        tiled = make(shape, checkpointing=checkpointing)
        run_in_tiles(tiled, tile)
        assert distance(gradients(tiled), plain) < 1e-8, tile


def test_gradients_of_bfloat16_weights_are_as_exact_as_without_tiles() -> None:
    """Against float64; the sums of an MLP's gradients are rounded once, as one product is."""
    exact = gradients(make("qwen2", dtype=torch.bfloat16).double())
    plain = gradients(make("qwen2", dtype=torch.bfloat16), autocast=True)
    for tile in TILES:
        tiled = make("qwen2", dtype=torch.bfloat16)
        run_in_tiles(tiled, tile)
        found = gradients(tiled, autocast=True)
        for part in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", ""):

            def only(all_of: dict[str, Tensor], part: str = part) -> dict[str, Tensor]:
                return {name: g for name, g in all_of.items() if part in name}

            error = distance(only(found), only(exact))
            assert 1e-4 < error <= 1.005 * distance(only(plain), only(exact)), (tile, part)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_of_an_adapter_is_drawn_again(checkpointing: bool) -> None:
    """The oracle: the same tiles and draws, differentiated by autograd alone."""

    def adapted() -> Any:
        model = make("qwen2", checkpointing=checkpointing)
        add_adapter(model, rank=4, alpha=8.0, dropout=0.5)
        model.double()
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data = torch.randn(weight.shape, dtype=torch.float64)
        return model

    oracle = adapted()
    for layer in decoder_layers(oracle):
        mlp: Any = layer.mlp
        mlp.forward = lambda x, run=mlp.forward: torch.cat(
            [run(part) for part in x[0].split(16)]
        ).view_as(x)
    tiled = adapted()
    run_in_tiles(tiled, 16)
    found, wanted = gradients(tiled), gradients(oracle)
    assert len(wanted) == 2 * 2 * 7  # A and B of seven layers, twice
    assert distance(found, wanted) < 1e-12


def test_without_gradients_it_is_the_same_function() -> None:
    model = make("qwen3").eval()
    ids = torch.randint(64, (3, 20))
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        run_in_tiles(model, 16)
        assert torch.allclose(model(input_ids=ids).logits, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_how_often_an_mlp_runs(checkpointing: bool) -> None:
    """Under checkpointing as often as without tiles: the layer is made again up to its MLP."""
    model = make("qwen2", checkpointing=checkpointing)
    rows: list[int] = []
    for layer in decoder_layers(model):
        gate: Any = layer.mlp.gate_proj  # pyright: ignore
        gate.register_forward_hook(lambda module, given, made: rows.append(given[0].shape[-2]))
    gradients(model)
    assert sum(rows) == (2 if checkpointing else 1) * 2 * TOKENS
    rows.clear()
    run_in_tiles(model, 16)
    gradients(model)
    assert sum(rows) == 2 * 2 * TOKENS


# --- through the learner --------------------------------------------------------------------------


@pytest.fixture
def learned(
    tokenizer: PreTrainedTokenizerFast, make_test_trainer: Any
) -> Callable[..., tuple[float, dict[str, Tensor]]]:
    """(loss, gradients) of one `Learner.update`: two packs of 3 sequences and less."""

    def run(tied: bool = True, **model: Any) -> tuple[float, dict[str, Tensor]]:
        trainer = make_test_trainer(
            make_questions(tokenizer, ["a"]), model=model, train={"max_tokens_per_microbatch": 64}
        )
        learner = trainer.learner
        policy = learner.policy
        if not tied:
            head = policy.model.get_output_embeddings()
            head.weight = nn.Parameter(head.weight.detach().clone())
            learner.optimiser.parameters = policy.trainable_parameters
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
        found: dict[str, Tensor] = {}
        step = learner.optimiser.step

        def look() -> Any:
            for name, p in policy.model.named_parameters():
                if p.grad is not None:
                    found[name] = p.grad.double()
            return step()

        learner.optimiser.step = look
        groups = worst_groups(2, 2, prompt_tokens=9, completion_tokens=12, vocabulary=200)
        report = learner.update(groups, trainer.objective)
        return report.losses[0], found

    return run


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "kind", [{"tied": True}, {"tied": False}, {"lora": {"rank": 4, "dropout": 0.0}}]
)
def test_an_update_is_the_same(learned: Any, kind: dict[str, Any], checkpointing: bool) -> None:
    same = {**kind, "gradient_checkpointing": checkpointing}
    loss, plain = learned(**same, tile_tokens=0)
    assert len(plain) > 10 and loss != 0
    for tile in (7, 59, 60, 1000):  # packs have 60 and 20 tokens
        tiled_loss, tiled = learned(**same, tile_tokens=tile)
        assert tiled_loss == pytest.approx(loss, abs=1e-6)
        assert distance(tiled, plain) < 1e-6


def test_no_name_changes(model_folder: Path, tmp_path: Path) -> None:
    plain = Policy(AutoModelForCausalLM.from_pretrained(model_folder))
    tiled = Policy(AutoModelForCausalLM.from_pretrained(model_folder), tile_tokens=8)
    names = [
        lambda policy: list(policy.model.state_dict()),
        lambda policy: [name for name, _ in policy.model.named_modules()],
        lambda policy: [name for name, _ in policy.named_weights()],
    ]
    for of in names:
        assert of(plain) == of(tiled)
    tiled.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[n], w) for n, w in plain.model.state_dict().items())


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_a_resumed_run_goes_on_bit_for_bit(
    tokenizer: PreTrainedTokenizerFast, make_test_trainer: Any
) -> None:
    def run() -> Any:
        return make_test_trainer(
            make_questions(tokenizer, [f"q{i}" for i in range(8)]),
            function="even_length",
            model={"tile_tokens": 16, "gradient_checkpointing": True},
        )

    whole = run()
    for _ in range(2):
        whole.step()
    path = whole.save()
    expected = [whole.step()[1]["loss_hex"] for _ in range(2)]
    resumed = run()
    model = resumed.learner.policy.model
    model.load_state_dict(type(model).from_pretrained(path / "hf").state_dict())
    resumed.load_state_dict(load_state(path))
    assert [resumed.step()[1]["loss_hex"] for _ in range(2)] == expected
    assert len(set(expected)) == 2


# --- less memory ----------------------------------------------------------------------------------

LARGE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 2048, "vocab_size": 32}
WIDE = Qwen2Config(**{**SMALL, **LARGE})


def rehearsal_peak(tile: int, checkpointing: bool) -> float:
    """Of the passes of an update of 1024 tokens in packs of 512, as the profiler records it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(WIDE)
    policy = Policy(
        model,
        gradient_checkpointing=checkpointing,
        tile_tokens=tile,
        max_tokens_per_microbatch=512,
    )
    learner = Learner(
        policy,
        Optimiser(policy.trainable_parameters, lr=1e-6),
        weights=WeightRule("constant", 228),
    )
    groups = worst_groups(2, 2, prompt_tokens=58, completion_tokens=228, vocabulary=32)
    learner.rehearse(groups, PolicyObjective())
    return peak_bytes(lambda: learner.rehearse(groups, PolicyObjective()))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_falls_as_planned(checkpointing: bool) -> None:
    planned, measured = [], []
    for tile in (0, 64):
        passes = Tracer(WIDE, Setting(torch.float32, torch.float32, checkpointing, None, tile))(512)
        held = states(passes, weights=torch.float32, optimiser="adamw", references=0, is_nf4=False)
        head = Head(32, 128, is_trained=True)
        peak = update(passes, head, PackShape(512, torch.float32, torch.float32, "cpu")).peak
        planned.append(held.gradients + peak)
        measured.append(rehearsal_peak(tile, checkpointing))
    assert planned == pytest.approx(measured, rel=0.02)
    assert measured[1] < 0.5 * measured[0]


def test_one_tile_is_alive_at_a_time() -> None:
    """What `run_tiled` itself allocates: two results of the pack's size, and one tile's values."""
    wide = nn.Sequential(nn.Linear(8, 512, bias=False), nn.SiLU(), nn.Linear(512, 8, bias=False))
    x = torch.randn(1024, 8, requires_grad=True)
    peak = peak_bytes(lambda: run_tiled(wide, wide.forward, 32, x).sum().backward())
    whole, tile, weights = 4 * 1024 * 8, 4 * 32 * 512, 2 * 4 * 512 * 8
    assert peak < 3 * whole + 5 * tile + 2 * weights < 4 * 1024 * 512  # the first product alone


# --- what cannot be tiled -------------------------------------------------------------------------


def test_a_mixture_of_experts_is_left_alone() -> None:
    config = MixtralConfig(**SMALL, num_local_experts=4)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(PolicyError, match="model.tile_tokens: the layers of mixtral have no"):
        Policy(model, tile_tokens=16)
    setting = Setting(torch.float32, torch.float32, checkpointing=True)
    assert not Tracer(config, setting).can_tile
    assert Tracer(SHAPES["qwen2"], setting).can_tile
