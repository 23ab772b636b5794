"""The memory plan of one process of several: its arithmetic, the allocator beside it, the commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import exit_code
from packaging.version import Version
from several_processes import run_processes
from transformers import Qwen2Config

from exgrpo_fast.config import Config, ConfigError, load_config
from exgrpo_fast.core.process_group import Processes
from exgrpo_fast.core.torchrun import RankInfo
from exgrpo_fast.memory import fit as planning
from exgrpo_fast.memory.fit import cheapest
from exgrpo_fast.memory.planner import GIB, Machine, Planner
from exgrpo_fast.memory.sharded import gathered
from exgrpo_fast.memory.trainer_memory import Head

SEVEN_BILLION = Qwen2Config(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)
PARAMETERS, MATRIX = 7_615_616_512, 152064 * 3584
LAYER = 2 * (3584**2 + 3584 * 512) + 3584 + 2 * 512 + 3 * 3584 * 18944 + 2 * 3584  # q o, k v, MLP


@pytest.fixture(scope="module")
def planner_for() -> Callable[..., Planner]:
    """Processes, GiB of each GPU -> planner; traces are shared."""
    tracers: dict[str, Any] = {}

    def make(processes: int, gib: int | None = None, engine: str = "vllm_server") -> Planner:
        made = Planner(SEVEN_BILLION, Machine("cuda", gib and gib * GIB, engine, processes))
        made.tracers = tracers
        return made

    return make


def exgrpo(**keys: str) -> Config:
    pairs = [("data.train", "train.jsonl"), ("rollout.engine", "vllm_server")]
    return load_config("exgrpo", [*pairs, *((k.replace("__", "."), v) for k, v in keys.items())])


# --- the arithmetic -------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [2, 8])
def test_states_are_shared_and_what_a_pass_needs_is_not(planner_for, processes: int) -> None:
    made = planner_for(processes).plan(exgrpo())
    held = made.states
    assert held.resident + held.gradients == 16 * PARAMETERS / processes
    standing = made.rows["gathered head and embedding"]
    assert standing == {"scoring": (2 + 2) * MATRIX, "update": (2 + 4 + 2) * MATRIX}
    kept = made.rows["activations kept"]["update"]
    floor = 2 * 28 * 3584 * made.config.microbatch_tokens  # the residual stream is bfloat16
    assert floor <= kept <= 1.25 * floor


def test_two_layers_and_their_gradients_are_ten_bytes_a_weight(planner_for) -> None:
    passes = planner_for(8).tracer(exgrpo())(4096)
    same: dict[str, Any] = {
        "layers": 28,
        "is_tied": False,
        "compute": torch.bfloat16,
        "count": 8,
    }
    whole = gathered(passes, Head(152064, 3584, is_trained=True), **same)
    found = whole.two_layers + whole.layer_gradients + whole.reduced_gradients
    assert found == pytest.approx(10 * LAYER, rel=1e-4)
    on_cpu = gathered(passes, Head(152064, 3584, is_trained=True), **same, device="cpu")
    assert on_cpu.reduced_gradients == pytest.approx(6 * LAYER, rel=1e-4)  # by a copy in bfloat16
    assert on_cpu.embedding_gradient == 6 * MATRIX
    assert whole.shards_of_layer == pytest.approx(4 * LAYER / 8, rel=1e-4)
    assert (whole.shard_of_head, whole.padded_head) == (4 * MATRIX / 8, 0)
    low = Head(152064, 3584, is_trained=True), same | {"count": 5, "weights": torch.bfloat16}
    uneven = gathered(passes, low[0], **low[1])
    assert (uneven.shard_of_head, uneven.padded_head) == (6 * MATRIX / 5, 4 * MATRIX)
    frozen = planner_for(8).tracer(exgrpo(model__lora__rank="32"))(4096)
    adapter = gathered(frozen, Head(152064, 3584, is_trained=False), **same)
    assert adapter.head_gradient == adapter.embedding_gradient == 0
    assert adapter.reduced_gradients == 2 * adapter.layer_gradients == 4 * frozen.trained / 28
    assert adapter.two_layers == pytest.approx(4 * (LAYER + frozen.trained / 28), rel=1e-4)


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_released_gradients_leave_the_shard_of_the_head(planner_for, weights: str) -> None:
    """Of the update of one process each of eight reads a part, so that packs are smaller as well."""
    keys = {"train__gradient_release": "true", "model__weights": weights}
    small = {"rollout__prompts_per_step": "8", "rollout__max_completion_tokens": "2048"}
    found = [planner_for(count).plan(exgrpo(**keys, **small)) for count in (1, 8)]
    config = found[0].config
    longest, total = config.longest_sequence, config.update_tokens
    assert found[0].config.microbatch_tokens == total
    made = found[1]
    assert made.config.microbatch_tokens == -(-(total + 7 * longest) // 8) + longest < total / 4
    size = 4 if weights == "float32" else 2
    assert made.rows["gradient of the head"]["update"] == size * MATRIX / 8
    assert made.rows["gathered head and embedding"]["update"] == (2 + 2) * MATRIX
    usual = planner_for(8).plan(exgrpo(model__weights=weights, **small))
    gone = size * (PARAMETERS - MATRIX) / 8
    assert usual.states.gradients - made.states.gradients == pytest.approx(gone)


def test_with_more_processes_a_run_fits_and_then_without_tiles(planner_for) -> None:
    config = exgrpo()
    found = [planner_for(count, 48).plan(config) for count in (2, 4, 8)]
    assert [made.fits for made in found] == [False, True, True]
    sizes = [(made.config.microbatch_tokens, made.config.tile_tokens) for made in found]
    assert sizes[1:] == [(16384, 4096), (16384, 0)]


def test_nothing_is_proposed_that_several_processes_refuse(planner_for) -> None:
    found = cheapest(planner_for(2, 48), exgrpo())
    assert found, "bfloat16 weights would do"
    assert all("model.quantization" not in change.keys for change in found)


def test_the_first_process_has_a_copy_to_generate_with(planner_for) -> None:
    own = planner_for(4, engine="transformers").plan(exgrpo()).rows
    linear = 28 * (LAYER - 3584 - 2 * 512 - 2 * 3584)  # without biases and norms
    assert own["whole copy for generation"]["update"] == 4 * PARAMETERS - 2 * linear


# --- beside the allocator -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, list[float]]]:
    return run_processes(1, Path(__file__).with_name("memory_worker.py"))[0]


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.12"),
    reason="this torch's fake processes leave the gradients they hand out uninitialised",
)
@pytest.mark.parametrize(
    "case",
    ["checkpointing", "all kept", "tiles", "adapters", "released", "released tiles"],
)
def test_a_process_takes_what_was_planned(found, case: str) -> None:
    planned, kept = found[case]["kept"]
    assert planned == pytest.approx(kept, rel=5e-3)
    for phase in ("update", "scoring"):
        planned, measured = found[case][phase]
        assert 0.98 <= planned / measured <= 1.12, (phase, planned / measured)


# --- the commands ---------------------------------------------------------------------------------


def dry_run(folder: Path, rank: int, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    """Its exit code."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "8")
    SEVEN_BILLION.save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "1 + 1?", "answer": "2"}) + "\n")
    words = "train exgrpo --dry-run --model.name model --data.train rows.jsonl"
    return exit_code(*words.split(), "--device-memory-gib", "80", *more)


def test_a_dry_run_under_torchrun_plans_for_one_of_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = ["--rollout.engine", "vllm_server", "--rollout.server.gpus", "[8]"]
    assert dry_run(tmp_path, 0, monkeypatch, *engine) == 0
    printed = capsys.readouterr().out
    assert "rank 0 of 8" in printed and "gathered head and embedding" in printed
    assert "train.max_tokens_per_microbatch 16384 (auto); 2.00 bytes a parameter" in printed
    assert dry_run(tmp_path, 1, monkeypatch, *engine) == 0
    assert capsys.readouterr().out == ""


def test_a_plan_beside_an_engine_that_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry_run(tmp_path, 0, monkeypatch) == 2
    assert "rollout.engine auto: vLLM in the trainer's process" in capsys.readouterr().err


class OneOfEight(Processes):
    """The first; another one's GPU has `smallest` GiB."""

    def __init__(self, smallest: int) -> None:
        super().__init__(RankInfo(0, 8, 0))
        self.smallest = smallest

    def all_reduce_max(self, value: float) -> float:
        return max(value, -self.smallest * GIB)

    def run_on_rank0(self, make: Callable[[], Any], **_: Any) -> Any:
        return json.loads(json.dumps(make()))


def test_a_run_takes_the_sizes_of_the_smallest_gpu(
    planner_for, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SEVEN_BILLION.save_pretrained(tmp_path)
    monkeypatch.setattr(planning, "device_bytes", lambda: 80 * GIB)
    config, notes = exgrpo(rollout__server__urls="[http://there:1]"), []

    def resolved(smallest: int) -> tuple[Config, planning.Expected | None]:
        return planning.resolve_auto(
            config,
            str(tmp_path),
            device="cuda",
            note=notes.append,
            processes=OneOfEight(smallest),
        )

    found = [resolved(gib) for gib in (80, 31)]
    assert [c.train.max_tokens_per_microbatch for c, _ in found] == [16384, 8192]
    for smallest, (_, expected) in zip((80, 31), found, strict=True):
        made = planner_for(8, smallest).plan(config)
        assert expected == planning.Expected.of(made)
        assert made.states.optimiser == PARAMETERS
    assert all("rank 0 of 8" in note for note in notes)
    with pytest.raises(ConfigError, match="this run does not fit"):
        resolved(16)
