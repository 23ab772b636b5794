"""The memory plan against the allocator, against the whole model, and as its user reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import exit_code, make_questions, peak_bytes, small_config
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from exgrpo_fast.build.quickstart.toy_model import make_model
from exgrpo_fast.build.run import run_preflight
from exgrpo_fast.config import Config, ConfigError, load_config, validate, with_values
from exgrpo_fast.memory.fit import Expected, cheapest, machine_of, plan_run, refusal, resolve_auto
from exgrpo_fast.memory.planner import GIB, Machine, MemoryPlan, Planner, table
from exgrpo_fast.memory.tracing import Ledger, Setting, Tracer, trace
from exgrpo_fast.memory.trainer_memory import (
    Head,
    PackShape,
    States,
    beside_a_teacher,
    states,
    update,
)
from exgrpo_fast.model.packing import sequences_of
from exgrpo_fast.training.preflight import DoesNotFit, rehearse, worst_groups

QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
LOW = Setting(torch.bfloat16, torch.bfloat16, checkpointing=True)
TOKENS = 16384


@pytest.fixture(scope="session")
def seven_billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shapes of Qwen2.5-7B: a config and nothing else."""
    folder = tmp_path_factory.mktemp("qwen-7b")
    (folder / "config.json").write_text(json.dumps(QWEN_7B))
    return folder


@pytest.fixture(scope="session")
def tracer(seven_billion: Path) -> Tracer:
    return Tracer(AutoConfig.from_pretrained(seven_billion), LOW)


@pytest.fixture(scope="session")
def planner_for(seven_billion: Path) -> Callable[[int | None], Planner]:
    """GiB of the GPU -> planner; the traces do not depend on it and are shared."""
    first = Planner(AutoConfig.from_pretrained(seven_billion), Machine("cuda", None, "vllm"))

    def make(gib: int | None) -> Planner:
        made = Planner(first.model, Machine("cuda", gib and gib * GIB, "vllm"))
        made.tracers = first.tracers
        return made

    return make


def exgrpo(folder: Path, **keys: str) -> Config:
    pairs = [("model.name", str(folder)), ("data.train", "train.jsonl")]
    return load_config("exgrpo", [*pairs, *((k.replace("__", "."), v) for k, v in keys.items())])


# --- the trace ------------------------------------------------------------------------------------


def test_parameters_of_the_whole_model_from_three_layers(tracer: Tracer) -> None:
    """7.616 billion, as the model card has it; 545 million each in the embedding and the head."""
    found = tracer(TOKENS)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(tracer.model)
    assert found.trained == sum(p.numel() for p in whole.parameters()) == 7_615_616_512
    linear = sum(m.weight.numel() for m in whole.modules() if isinstance(m, nn.Linear))
    assert found.quantisable == linear - whole.lm_head.weight.numel()


def test_more_layers_are_extrapolated_exactly() -> None:
    small = Qwen2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    settings = [LOW, Setting(torch.float32, torch.bfloat16, checkpointing=False)]
    settings += [replace(LOW, lora={"rank": 4, "alpha": 8.0}, tile_tokens=tile) for tile in (0, 64)]
    for setting in settings:
        whole = trace(small, setting, layers=7, tokens=200)
        assert Tracer(small, setting)(200) == whole


def test_checkpoints_are_close_to_their_floor(tracer: Tracer) -> None:
    """Kept: the input of each layer, 28 x 3584 bfloat16 a token, and little beside."""
    floor = 28 * 3584 * 2
    assert floor / 2**20 == pytest.approx(0.191, abs=5e-4)
    assert floor <= tracer(TOKENS).saved / TOKENS <= 1.25 * floor
    whole = Tracer(tracer.model, Setting(torch.bfloat16, torch.bfloat16, checkpointing=False))
    assert whole(TOKENS).saved > 20 * tracer(TOKENS).saved


# --- the arithmetic -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "optimiser", "per_parameter"),
    [
        ("float32", "adamw", 16.0),
        ("bfloat16", "flash_adamw", 8.125),
        ("bfloat16", "adamw_8bit", 6.03),
    ],
)
def test_bytes_a_parameter(
    tracer: Tracer, weights: str, optimiser: str, per_parameter: float
) -> None:
    held: States = states(
        tracer(TOKENS),
        weights=getattr(torch, weights),
        optimiser=optimiser,
        references=0,
        is_nf4=False,
    )
    found = (held.resident + held.gradients) / 7_615_616_512
    assert found == pytest.approx(per_parameter, abs=2e-3)


def test_chunks_of_logits_are_the_kernels_own(tracer: Tracer) -> None:
    """On a GPU 1280 MiB of bfloat16 logits: 4352 rows of this vocabulary."""
    head = Head(152064, 3584, is_trained=True)
    pack = PackShape(TOKENS, torch.bfloat16, torch.bfloat16, "cuda")
    made = update(tracer(TOKENS), head, pack)
    assert made.chunk == 4352 * 152064 * 2
    assert made.head_gradient == TOKENS * 3584 * 2 + 4 * 152064 * 3584


def test_an_update_takes_what_was_planned(
    tokenizer: PreTrainedTokenizerFast, make_test_trainer: Any
) -> None:
    """Every byte that `Learner.update` allocates, as the profiler records them."""
    tokens = 51 + 4 * 199  # a prompt and its responses: two such packs
    trainer = make_test_trainer(
        make_questions(tokenizer, ["a"]),
        model={"gradient_checkpointing": True},
        rollout={"max_completion_tokens": 200},
        train={"max_tokens_per_microbatch": tokens},
    )
    learner, policy = trainer.learner, trainer.learner.policy
    groups = worst_groups(2, 4, prompt_tokens=51, completion_tokens=200, vocabulary=200)
    learner.update(groups, trainer.objective)
    peak = peak_bytes(lambda: learner.update(groups, trainer.objective))

    setting = Setting(torch.float32, torch.float32, checkpointing=True)
    config = policy.model.config
    passes = Tracer(config, setting)(tokens)
    head = Head(config.vocab_size, config.hidden_size, is_trained=True)
    pack = PackShape(tokens, torch.float32, torch.float32, "cpu")
    held = states(passes, weights=torch.float32, optimiser="adamw", references=0, is_nf4=False)
    planned = held.gradients + update(passes, head, pack).peak
    assert planned == pytest.approx(peak, rel=0.05)
    assert held.gradients == sum(4 * p.numel() for p in policy.model.parameters())


def test_distillation_takes_what_was_planned(
    tokenizer: PreTrainedTokenizerFast, make_test_trainer: Any, model_folder: Path
) -> None:
    """The same of an update that compares whole distributions; the teacher has the policy's shape."""
    tokens = 51 + 4 * 199
    distillation = {"teacher": str(model_folder), "divergence": "reverse", "rewards": False}
    trainer = make_test_trainer(
        make_questions(tokenizer, ["a"]),
        model={"gradient_checkpointing": True},
        rollout={"max_completion_tokens": 200},
        train={"max_tokens_per_microbatch": tokens},
        algorithm={"distillation": distillation},
    )
    learner, policy = trainer.learner, trainer.learner.policy
    groups = worst_groups(2, 4, prompt_tokens=51, completion_tokens=200, vocabulary=200)
    learner.update(groups, trainer.objective)
    peak = peak_bytes(lambda: learner.update(groups, trainer.objective))

    config = policy.model.config
    passes = Tracer(config, Setting(torch.float32, torch.float32, checkpointing=True))(tokens)
    head = Head(config.vocab_size, config.hidden_size, is_trained=True)
    pack = PackShape(tokens, torch.float32, torch.float32, "cpu")
    without = update(passes, head, pack)
    made = beside_a_teacher(without, head, pack)
    held = states(passes, weights=torch.float32, optimiser="adamw", references=0, is_nf4=False)
    assert held.gradients + made.peak == pytest.approx(peak, rel=0.08)
    assert made.peak > without.peak


# --- what is held ---------------------------------------------------------------------------------


def watch(policy: Any, ledger: Ledger, size: Callable[[Any], int]) -> tuple[list[int], list[int]]:
    """What is live at the start of each forward pass from now on, and the size of its pack."""
    forward, live, sizes = policy.hidden_states, [], []

    def watched(packed: Any) -> torch.Tensor:
        live.append(ledger.live)
        sizes.append(size(packed))
        return forward(packed)

    policy.hidden_states = watched
    return live, sizes


@pytest.mark.parametrize("tile", [0, 16])
@pytest.mark.parametrize("adapter", [False, True])
def test_nothing_of_a_pack_but_gradients_is_held_during_the_next(
    tokenizer: PreTrainedTokenizerFast, make_test_trainer: Any, adapter: bool, tile: int
) -> None:
    """Frozen embeddings, too: their output must not be a leaf that the graph holds on to."""
    lora = {"rank": 4, "alpha": 8.0} if adapter else None
    model = {"gradient_checkpointing": True, "tile_tokens": tile, "lora": lora}
    trainer = make_test_trainer(make_questions(tokenizer, ["a"]), model=model)
    policy, learner = trainer.learner.policy, trainer.learner
    groups = worst_groups(8, 8, prompt_tokens=32, completion_tokens=12, vocabulary=256)
    ledger = Ledger([*policy.model.parameters(), *policy.model.buffers()])
    live, tokens = watch(policy, ledger, lambda packed: len(packed.input_ids))
    with ledger:
        learner.rehearse(groups, trainer.objective)
    assert len(live) > 2
    gradients = sum(p.numel() * p.element_size() for p in policy.trainable_parameters)
    one_layer = min(tokens) * policy.model.config.hidden_size * 4
    for held in live[1:]:
        assert 0 <= held - live[0] - gradients < one_layer / 2


@pytest.mark.parametrize("in_bfloat16", [False, True])
def test_scoring_holds_one_pack_at_a_time(
    tokenizer: PreTrainedTokenizerFast, make_test_trainer: Any, in_bfloat16: bool
) -> None:
    """Neither the hidden states nor the head in the compute dtype stay for the next pack."""
    model = {"dtype": "bfloat16" if in_bfloat16 else "float32"}
    policy = make_test_trainer(make_questions(tokenizer, ["a"]), model=model).learner.policy
    ledger = Ledger([*policy.model.parameters(), *policy.model.buffers()])
    live, rows = watch(policy, ledger, lambda packed: len(packed.targets))
    groups = worst_groups(8, 8, prompt_tokens=32, completion_tokens=12, vocabulary=256)
    with ledger:
        policy.score(*sequences_of([t for group in groups for t in group.trajectories]))
    assert len(live) > 2
    hidden = min(rows) * policy.model.config.hidden_size * policy.compute_dtype.itemsize
    assert max(live) - live[0] < hidden / 2


# --- the plan of a run ----------------------------------------------------------------------------


def test_seven_billion_on_80_gib(seven_billion: Path) -> None:
    config = exgrpo(seven_billion, model__weights="bfloat16")
    planned = plan_run(config, str(seven_billion), machine_of(config, memory_gib=80))
    made = planned.plan
    assert planned.refusal is None and made.engine is not None
    assert made.config.train.max_tokens_per_microbatch == 16384
    # 8.1 bytes a parameter, activations and logits; the store apart, at most 66 GiB with 1.5 spare
    assert 60 * GIB < made.totals["update"] - 2 * GIB < 66 * GIB
    assert made.engine.sleeps and made.engine.kv_cache_bytes / made.bytes_per_token > 100_000
    assert max(made.totals.values()) <= 72 * GIB
    for line in (
        "memory plan: 7.616 billion parameters, 7.616 trained, on 80 GiB",
        "weights (bfloat16)",
        "train.max_tokens_per_microbatch 16384 (auto); 8.12 bytes a parameter",
        "model.tile_tokens 0 (auto): no tiles",
        "rollout.sleep auto: vLLM sleeps during the update",
    ):
        assert line in planned.text


def test_what_does_not_fit_is_refused_with_what_would(
    seven_billion: Path, planner_for: Callable[..., Planner]
) -> None:
    planner, config = planner_for(80), exgrpo(seven_billion)
    line = refusal(planner.plan(config), cheapest(planner, config))
    assert "\n" not in line
    assert "128.8 GiB are needed, 72.0 can be planned with; it would with" in line
    for change in (
        "--model.weights bfloat16 --train.optimizer auto",
        "--model.weights bfloat16 --train.optimizer adamw_8bit",
        "--model.lora.rank 32 --model.weights bfloat16",
    ):
        assert change in line


def test_every_change_that_is_proposed_makes_it_fit(
    seven_billion: Path, planner_for: Callable[..., Planner]
) -> None:
    planner, config = planner_for(32), exgrpo(seven_billion)
    found = cheapest(planner, config)
    assert found and all("model.lora.rank" in change.keys for change in found)
    for change in found:
        words = {key.replace(".", "__"): str(value) for key, value in change.keys.items()}
        made = planner.plan(exgrpo(seven_billion, **words))
        assert made.fits and made.totals["update"] == change.update_bytes


def test_a_smaller_card_gets_tiles_and_then_smaller_packs(
    seven_billion: Path, planner_for: Callable[..., Planner]
) -> None:
    found = []
    for gib in (80, 74, 73):
        planner = planner_for(gib)
        made = planner.plan(exgrpo(seven_billion, model__weights="bfloat16"))
        assert made.fits
        found.append((made.config.microbatch_tokens, made.config.tile_tokens))
    assert found == [(16384, 0), (16384, 4096), (8192, 0)]
    with_more = exgrpo(
        seven_billion, model__weights="bfloat16", train__max_tokens_per_microbatch="32768"
    )
    assert not planner.plan(with_more).fits


def test_checkpointing_is_left_out_where_a_gpu_has_room(
    seven_billion: Path, planner_for: Callable[..., Planner]
) -> None:
    def made_for(gib: int, **keys: str) -> MemoryPlan:
        config = exgrpo(seven_billion, model__weights="bfloat16", **keys)
        return planner_for(gib).plan(config)

    plans = {gib: made_for(gib) for gib in (141, 160, 192, 288)}
    sizes = {
        g: (p.config.microbatch_tokens, p.config.gradient_checkpointing) for g, p in plans.items()
    }
    assert sizes == {
        141: (16384, True),
        160: (4096, False),
        192: (8192, False),
        288: (16384, False),
    }
    assert all(p.fits and p.engine is not None and not p.engine.sleeps for p in plans.values())
    with_checkpoints = made_for(288, model__gradient_checkpointing="true")
    assert with_checkpoints.config.gradient_checkpointing
    assert with_checkpoints.engine == plans[288].engine, "vLLM would pay for it"
    # 28 layers x 16384 tokens of Qwen2.5-7B: docs/memory.md has the figure a token
    saved = (plans[288].update.saved - with_checkpoints.update.saved) / 16384 / 2**20
    assert saved == pytest.approx(6.24 - 0.219, abs=0.02)
    for keys in (
        {"model__offload_activations": "true"},
        {"model__tile_tokens": "4096"},
        {"rollout__kv_cache_gib": "170"},
    ):
        assert made_for(288, **keys).config.gradient_checkpointing, keys
    assert (
        "model.gradient_checkpointing false (auto): all of a layer's activations are kept"
        in table(plans[288], exgrpo(seven_billion))
    )


def small_updates(folder: Path, **keys: str) -> Config:
    """An update is a question with 8 responses: 512 + 8 x 1984 = 16384 tokens at most."""
    own = {
        "rollout__prompts_per_step": "32",
        "rollout__group_size": "8",
        "rollout__max_completion_tokens": "1984",
        "train__minibatches": "32",
        "model__weights": "bfloat16",
    }
    return exgrpo(folder, **own | keys)


def test_released_gradients_are_planned(
    seven_billion: Path, planner_for: Callable[..., Planner]
) -> None:
    """Of 14.19 GiB of gradients the head's 1.02 stay. What lies above the last layer stays as well:
    the final norm keeps 3584 float32 and as many bfloat16 a token, the loss a gradient."""
    planner = planner_for(80)
    usual = planner.plan(small_updates(seven_billion))
    made = planner.plan(small_updates(seven_billion, train__gradient_release="true"))
    assert made.config.microbatch_tokens == usual.config.microbatch_tokens == 16384
    assert (usual.config.tile_tokens, made.config.tile_tokens) == (0, 0)
    assert usual.rows["gradients"]["update"] == 2 * 7_615_616_512
    assert made.rows["gradient of the head"]["update"] == 2 * 152064 * 3584
    saved = usual.totals["update"] - made.totals["update"]
    above = 16384 * 3584 * (4 + 2 + 2)
    assert saved == pytest.approx(2 * (7_615_616_512 - 152064 * 3584) - above, rel=1e-3)
    logits = "forward pass, logits"
    assert made.rows[logits] == usual.rows[logits]
    text = plan_run(made.config, str(seven_billion), machine_of(made.config, memory_gib=80)).text
    assert "gradient of the head            -         -      1.02" in text
    assert "train.gradient_release: one pack an update" in text


def test_no_pack_of_a_released_update_is_smaller(
    seven_billion: Path, planner_for: Callable[..., Planner]
) -> None:
    """What does not fit stays whole, and the proposals make fewer responses of it."""
    keys = {"train__gradient_release": "true", "train__minibatches": "4"}
    made = planner_for(80).plan(small_updates(seven_billion, **keys))
    assert made.is_hopeless and made.config.microbatch_tokens == 8 * 16384


def test_small_updates_are_offered_release(
    seven_billion: Path, planner_for: Callable[..., Planner]
) -> None:
    planner = planner_for(None)
    planner.machine = Machine("cuda", 64 * GIB, "transformers")
    engine = {"rollout__max_batch_sequences": "16"}
    config = small_updates(seven_billion, **engine)
    assert not planner.plan(config).fits
    found = cheapest(planner, config)
    assert found[0].keys == {
        "train.gradient_release": True,
        "train.max_tokens_per_microbatch": "auto",
    }
    words = {key.replace(".", "__"): str(value) for key, value in found[0].keys.items()}
    assert planner.plan(small_updates(seven_billion, **engine | words)).fits


def test_a_kl_term_costs_a_copy_and_an_adapter_saves_it(
    seven_billion: Path, planner_for: Callable[..., Planner]
) -> None:
    planner = planner_for(None)
    keys = {"model__weights": "bfloat16", "algorithm__kl__coef": "0.1"}
    whole = planner.plan(exgrpo(seven_billion, **keys)).states
    adapter = planner.plan(exgrpo(seven_billion, **keys, model__lora__rank="32")).states
    assert whole.references == whole.weights == 2 * 7_615_616_512
    float32 = planner.plan(exgrpo(seven_billion, algorithm__kl__coef="0.1")).states
    linear = 6_525_288_448  # weights of the layers; embedding, head, norms and biases stay float32
    assert float32.references == 4 * 7_615_616_512 - 2 * linear
    assert (adapter.references, adapter.gradients) == (0, 4 * 80_740_352)


def test_the_tokens_that_top_k_kept_are_planned(
    seven_billion: Path, planner_for: Callable[[int | None], Planner]
) -> None:
    planner = planner_for(None)
    whole = validate({"model": {"name": str(seven_billion)}})
    made = planner.plan(with_values(whole, {"rollout.top_k": 512}))
    tokens = made.config.microbatch_tokens
    planned = {"scoring": 4 * 512 * tokens, "update": 4 * 512 * tokens}
    assert made.rows["tokens that top_k kept"] == planned
    assert "tokens that top_k kept" not in planner.plan(whole).rows


def test_a_teacher_is_planned_for(
    seven_billion: Path, planner_for: Callable[[int | None], Planner]
) -> None:
    planner = planner_for(None)
    keys = {"model__weights": "bfloat16", "algorithm__distillation__teacher": str(seven_billion)}
    sampled = planner.plan(exgrpo(seven_billion, **keys))
    whole = planner.plan(
        exgrpo(seven_billion, **keys, algorithm__distillation__divergence="reverse")
    )
    assert sampled.states.references == whole.states.references == 2 * 7_615_616_512
    assert whole.config.microbatch_tokens == sampled.config.microbatch_tokens == TOKENS
    hidden = 2 * 3584 * TOKENS
    assert whole.update.chunk == sampled.update.chunk  # a sixth of the rows, six times as large
    assert whole.update.loss - sampled.update.loss == 2 * hidden
    assert whole.update.backward - sampled.update.backward == hidden


@pytest.mark.parametrize("words", ["train exgrpo --dry-run --data.train train.jsonl", "doctor"])
def test_the_commands_print_it(
    seven_billion: Path,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "answer": "1"}\n')
    (tmp_path / "c.yaml").write_text(f"model: {{name: {seven_billion}, weights: bfloat16}}\n")
    options = ["--config", "c.yaml"]
    if words.startswith("train"):
        options = ["--model.name", str(seven_billion), "--model.weights", "bfloat16"]
    assert exit_code(*words.split(), *options, "--device-memory-gib", "80") == 0
    assert "activations 0.219 MiB a token, logits in chunks of" in capsys.readouterr().out


def test_a_size_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("doctor", "--device-memory-gib", "big") == 2
    assert "--device-memory-gib: big is not a size in GiB" in capsys.readouterr().err


# --- the preflight --------------------------------------------------------------------------------


def snapshot(trainer: Any) -> list[torch.Tensor]:
    learner = trainer.learner
    tensors = [*learner.policy.model.state_dict().values()]
    for entry in learner.optimiser.state_dict()["moments"].values():
        tensors += entry.values()
    return [t.clone() for t in tensors]


@pytest.mark.parametrize("steps", [0, 1])
def test_the_preflight_changes_nothing(
    steps: int, tokenizer: PreTrainedTokenizerFast, make_test_trainer: Any
) -> None:
    trainer = make_test_trainer(
        make_questions(tokenizer, ["a", "b", "c", "d"]),
        model={"lora": {"rank": 4, "dropout": 0.5}},
        algorithm={"kl": {"coef": 0.1}},
    )
    for _ in range(steps):
        trainer.step()
    before, noise = snapshot(trainer), torch.get_rng_state()
    seen: list[int] = []
    policy = trainer.learner.policy
    hidden_states = policy.hidden_states
    policy.hidden_states = lambda packed: (
        seen.append(len(packed.input_ids)),
        hidden_states(packed),
    )[1]
    found = rehearse(
        trainer.learner,
        trainer.objective,
        prompt_tokens=32,
        completion_tokens=12,
        state_bytes=1000.0,
    )
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(trainer), strict=True))
    assert torch.equal(noise, torch.get_rng_state())
    assert all(p.grad is None for p in policy.model.parameters())
    assert trainer.learner.optimiser.num_updates == steps
    # 256 tokens a pack: a prompt of 32 and 20 responses of 11; two packs: scored, by the reference,
    # with gradients
    assert (found.sequences, found.tokens) == (40, 43)
    assert seen == [252] * 6
    assert found.peak_gib > 0


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_weights_are_copied_while_a_cpu_generates(
    tokenizer: PreTrainedTokenizerFast, dtype: str, itemsize: int
) -> None:
    model = make_model(tokenizer, seed=0, layers=1, width=48)
    config = validate({"model": {"dtype": dtype}, "rollout": {"max_completion_tokens": 12}})
    rows = Planner(model.config, Machine("cpu", None, "transformers")).plan(config).rows
    found = rows["generation: packed weights"]["rollout"]
    assert found == itemsize * sum(p.numel() for p in model.parameters())


def test_a_device_that_is_too_small_is_said(
    tokenizer: PreTrainedTokenizerFast,
    make_test_trainer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = make_test_trainer(make_questions(tokenizer, ["a"]))

    def full(packed: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. More words")

    monkeypatch.setattr(trainer.learner.policy, "hidden_states", full)
    planned = Planner(trainer.learner.policy.model.config, Machine("cpu", None, "transformers"))
    config = validate({"data": {"max_prompt_tokens": 32}, "rollout": {"max_completion_tokens": 12}})
    with pytest.raises(DoesNotFit, match="CUDA out of memory.*dry-run.*smaller train.max_tokens"):
        run_preflight(config, trainer, Expected.of(planned.plan(config)))
    assert trainer.learner.policy.sizes.take_halvings() == (0, 0), "a rehearsal keeps its sizes"


# --- offload --------------------------------------------------------------------------------------


def test_offloaded_activations_give_the_same_gradients(
    tokenizer: PreTrainedTokenizerFast, make_test_trainer: Any
) -> None:
    def gradients(offload: bool) -> tuple[list[torch.Tensor], int]:
        trainer = make_test_trainer(
            make_questions(tokenizer, ["a"]),
            model={"gradient_checkpointing": True, "offload_activations": offload},
        )
        learner = trainer.learner
        made: list[torch.Tensor] = []
        learner.optimiser.discard = lambda: made.extend(
            p.grad for p in learner.policy.trainable_parameters
        )
        packed: list[int] = []
        kept = torch.autograd.graph.save_on_cpu.__init__

        def count(self: Any, *arguments: Any, **options: Any) -> None:
            packed.append(1)
            kept(self, *arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.autograd.graph.save_on_cpu, "__init__", count)
            learner.rehearse(
                worst_groups(2, 2, prompt_tokens=8, completion_tokens=12, vocabulary=200),
                trainer.objective,
            )
        return made, len(packed)

    (plain, never), (offloaded, once) = gradients(False), gradients(True)
    assert (never, once) == (0, 1)
    assert all(torch.equal(a, b) for a, b in zip(plain, offloaded, strict=True))
    with pytest.raises(ConfigError, match="offload_activations needs model.gradient_checkpointing"):
        validate({"model": {"offload_activations": True, "gradient_checkpointing": False}})


def test_auto_is_resolved_on_a_cpu_for_the_preflight_alone(model_folder: Path) -> None:
    notes: list[str] = []
    config = small_config(model_folder, "right", {"train": {"max_tokens_per_microbatch": "auto"}})
    folder = str(model_folder)
    assert resolve_auto(config, folder, device="cpu", note=notes.append) == (config, None)
    assert notes == []
    config = with_values(config, {"train.preflight": "always"})
    resolved, expected = resolve_auto(config, folder, device="cpu", note=notes.append)
    made = plan_run(config, folder, machine_of(config, device="cpu")).plan
    assert expected is not None and expected.optimiser > 0
    assert expected == Expected.of(made)
    assert resolved.train.max_tokens_per_microbatch == config.microbatch_tokens
    assert resolved.model.tile_tokens == 0 and len(notes) == 1
