"""The arithmetic of bench/scale_model.py, by hand for one small case."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale_model", ROOT / "bench/scale_model.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


model = load_script()
SHAPE = model.Shape(parameters=1000.0, vocabulary=10, width=2, kv_bytes=4.0)
WORK = model.Work(questions=2, group_size=2, completion_tokens=100)
HARDWARE = model.Hardware(
    memory_bytes=2000.0,
    peak_flops=1e6,
    memory_bandwidth=1e4,
    gpus_a_node=4,
    nvlink=1000.0,
    network=100.0,
)
REACHED = model.Reached(
    flops=0.5, nvlink=0.5, network=0.5, memory_bandwidth=0.5, sequences=2, server_memory=0.5
)


def test_a_step_of_two_ranks_and_one_server() -> None:
    assert model.server_gpus(SHAPE, HARDWARE, REACHED) == 2  # 2000 bytes of weights, 1000 a GPU
    found = model.step(SHAPE, WORK, 2, 1, HARDWARE, REACHED)
    # 400 tokens are 2 packs of 200: one pass for each rank. It receives half of 4 x 1000 gathered for
    # the update, 4 x 1000 reduced, 2 x 1000 gathered to score, 6 x 20 of the head, and 4 x 1000 for
    # the servers.
    assert (found.training_gpus, found.servers, found.server_gpus) == (2, 1, 2)
    assert found.pack_tokens == 200
    assert found.network_gb * 1e9 == pytest.approx((8000 + 2000 + 120 + 4000) / 2)
    assert found.compute_seconds == pytest.approx(10 * 1000 * 200 / 5e5)  # 4 s
    assert found.network_seconds == pytest.approx(7060 / 500)  # NVLink: 2 ranks
    # 4 requests, 2 at a time: 2 rounds of 100 tokens; each reads 2000 bytes of weights and
    # 2 x 75 x 4 of keys and values at half of 2 x 1e4 bytes a second.
    assert found.generation_seconds == pytest.approx(2 * 100 * 2600 / 1e4)
    assert found.sync_seconds == pytest.approx(2000 / 500)
    assert found.overlapped == pytest.approx(14.12 + 52 + 4)
    assert found.in_turn == pytest.approx(4 + 14.12 + 52 + 4)


def test_more_ranks_than_packs_and_more_than_a_node() -> None:
    found = model.step(SHAPE, WORK, 8, 4, HARDWARE, REACHED)
    assert found.pack_tokens == 100, "a pack holds a whole completion: 4 packs for 8 ranks"
    assert found.compute_seconds == pytest.approx(10 * 1000 * 100 / 5e5)
    assert found.network_seconds == pytest.approx(14120 * 7 / 8 / 50)
    assert found.generation_seconds == pytest.approx(100 * 2300 / 1e4), "one sequence a server"
    assert model.break_even_tokens(2, HARDWARE, REACHED) == 1000.0
    assert model.break_even_tokens(8, HARDWARE, REACHED) == 10000.0


def test_one_rank_sends_nothing_and_one_gpu_does_both() -> None:
    assert model.network_bytes(SHAPE, WORK, 1) == 0.0
    assert model.splits(1, 1) == [(1, 0)] and model.splits(1, 2) == []
    assert (2, 3) in model.splits(8, 2) and all(r + 2 * s <= 8 for r, s in model.splits(8, 2))


def test_the_page_says_what_is_assumed_and_where_both_break_even() -> None:
    found = json.loads((ROOT / "bench/results/scale_model.json").read_text())
    page = (ROOT / "docs/scale.md").read_text()
    for tokens in found["break_even_tokens"].values():
        assert f"{round(tokens, -1):,.0f}" in page
    hardware, reached = model.Hardware(), model.Reached()
    assert found["hardware"] == vars(hardware) and found["reached"] == vars(reached)
    for said in (f"{hardware.peak_flops / 1e12:.0f}e12", "3.35e12", "450e9", "400 Gb/s"):
        assert said in page
    shares = (reached.flops, reached.memory_bandwidth, reached.nvlink, reached.network)
    assert all(f"{100 * share:.0f} %" in page for share in shares)


def test_the_memory_table_follows_from_shapes() -> None:
    page = (ROOT / "docs/scale.md").read_text()
    heading = (
        "| model (P, V x D, layers) | R | states | head | embedding | layers | activations | sum |"
    )
    rows = page.partition(heading)[2].partition("\n\n")[0].splitlines()[2:]
    parameters = vocabulary = width = layers = 0.0
    assert len(rows) == 7
    for row in rows:
        first, ranks, *said = (cell.strip() for cell in row.strip("|").split("|"))
        if first:
            parameters, vocabulary, width, layers = map(
                float, re.findall(r"\d[\d.e]*(?=[ ,)])", first)
            )
        head = vocabulary * width
        of_layer = (parameters - 2 * head) / layers
        parts = [16 * parameters / int(ranks), 6 * head, 6 * head, 10 * of_layer]
        parts.append(2 * model.PACK_TOKENS * width * layers)
        expected = [part / model.GIB for part in [*parts, sum(parts)]]
        assert [float(value) for value in said] == pytest.approx(expected, abs=0.0501), row


def test_memory_is_the_plan_of_one_rank() -> None:
    """7B on 8: 16 bytes a parameter are sharded, the rest is not."""
    memory = model.Memory(model.MODELS["7B"], model.Hardware(), model.Work())
    plans = {ranks: memory.plan(ranks, "vllm_server") for ranks in (8, 16)}
    assert plans[8].states.resident + plans[8].states.gradients == 16 * plans[8].parameters / 8
    saved = plans[8].peak - plans[16].peak
    assert saved == pytest.approx(16 * plans[8].parameters * (1 / 8 - 1 / 16), rel=1e-6)
    found = json.loads((ROOT / "bench/results/scale_model.json").read_text())["rows"]
    (row,) = (r for r in found if r["model"] == "7B" and r["gpus"] == 16)
    planned = memory.plan(row["training_gpus"], "vllm_server").peak / model.GIB
    assert planned == pytest.approx(row["memory_gib"])
