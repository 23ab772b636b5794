"""What 1 to 512 GPUs take for a step: seconds, bytes over the network, memory. Arithmetic, no run.

    python bench/scale_model.py [--out bench/results/scale_model.json]

Memory is the plan of rank 0 (`exgrpo_fast/memory`, which `bench/memory_sharded.py` holds against
allocations under torch's fake process group). Operations and bytes follow from the shapes. Peaks and
bandwidths are those of published data sheets, each beside its source; what share of them is reached
is an assumption, printed with the table. Nothing here was timed on a GPU.

Legend: P parameters, V vocabulary, D width, R training GPUs, S rollout servers.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import Qwen2Config

from exgrpo_fast.config import validate
from exgrpo_fast.memory.planner import Machine, Planner

GIB = 2**30
WORLD_SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
PACK_TOKENS = 16384


@dataclass(frozen=True)
class Hardware:
    """One GPU and its links. Bytes and operations a second."""

    name: str = "H100 SXM, 80 GiB"
    memory_bytes: float = 80 * GIB
    peak_flops: float = 989e12  # bfloat16, dense: NVIDIA H100 data sheet
    memory_bandwidth: float = 3.35e12  # the same data sheet
    gpus_a_node: int = 8
    nvlink: float = 450e9  # one direction of 900 GB/s: the same data sheet
    network: float = 50e9  # 400 Gb/s, a ConnectX-7 port for each GPU: NVIDIA DGX H100 user guide


@dataclass(frozen=True)
class Reached:
    """Assumptions: the share of each published figure that a run reaches, and the decoding width."""

    flops: float = 0.40  # of the peak, in forward and backward passes
    nvlink: float = 0.78
    network: float = 0.90
    memory_bandwidth: float = 0.60  # while decoding
    sequences: int = 256  # that a server decodes side by side
    server_memory: float = 0.5  # of a server's memory, at most, for weights; more GPUs beyond


@dataclass(frozen=True)
class Shape:
    parameters: float
    vocabulary: int
    width: int
    kv_bytes: float  # of one token, bfloat16

    @property
    def head(self) -> float:
        return float(self.vocabulary * self.width)


@dataclass(frozen=True)
class Work:
    """One step."""

    questions: int = 64
    group_size: int = 8
    completion_tokens: int = 2000
    updates: int = 1

    @property
    def tokens(self) -> int:
        return self.questions * self.group_size * self.completion_tokens


# --- one step -------------------------------------------------------------------------------------


def pack_tokens(work: Work, ranks: int) -> int:
    """Tokens of a pack: as many as leave one for each rank, at least one completion."""
    return max(work.completion_tokens, min(PACK_TOKENS, work.tokens // ranks))


def passes(work: Work, ranks: int) -> int:
    """Of each rank, which all make equally many: the packs dealt out, rounded up."""
    return math.ceil(math.ceil(work.tokens / pack_tokens(work, ranks)) / ranks)


def network_bytes(shape: Shape, work: Work, ranks: int) -> float:
    """Received by each rank in a step.

    A pass with gradient gathers bfloat16 weights twice and reduces float32 gradients, a pass that
    scores gathers them once; the head is gathered and reduced once an update; the new weights of
    the servers are gathered in float32.
    """
    count = passes(work, ranks)
    whole = count * (2 + 2 + 4 + 2) * shape.parameters
    whole += work.updates * (2 + 4) * shape.head + 4 * shape.parameters
    return whole * (ranks - 1) / ranks


def compute_seconds(
    shape: Shape, work: Work, ranks: int, hardware: Hardware, reached: Reached
) -> float:
    """Of the slowest rank: 8 P operations a token in an update with checkpointing, 2 P to score."""
    tokens = passes(work, ranks) * pack_tokens(work, ranks)
    return 10 * shape.parameters * min(tokens, work.tokens) / (reached.flops * hardware.peak_flops)


def link(ranks: int, hardware: Hardware, reached: Reached) -> float:
    """Bytes a second of the slowest link on the ring of all ranks."""
    if ranks <= hardware.gpus_a_node:
        return reached.nvlink * hardware.nvlink
    return reached.network * hardware.network


def break_even_tokens(ranks: int, hardware: Hardware, reached: Reached) -> float:
    """Of a pass with gradient on each rank, whose 8 P bytes then take as long as its 8 P
    operations a token, whatever the model."""
    return reached.flops * hardware.peak_flops / link(ranks, hardware, reached)


def server_gpus(shape: Shape, hardware: Hardware, reached: Reached) -> int:
    """Of one server: the smallest power of two with room for bfloat16 weights beside a cache."""
    room = reached.server_memory * hardware.memory_bytes
    return 2 ** max(0, math.ceil(math.log2(2 * shape.parameters / room)))


def generation_seconds(
    shape: Shape, work: Work, servers: int, hardware: Hardware, reached: Reached
) -> float:
    """Of all completions at full length. A decoding step reads all weights and, on average, 3/4 of
    the longest cache of the server's sequences: more servers do not read the weights any faster."""
    requests = work.questions * work.group_size
    sequences = min(reached.sequences, math.ceil(requests / servers))
    rounds = math.ceil(requests / (servers * sequences))
    kept = sequences * 0.75 * work.completion_tokens * shape.kv_bytes
    bandwidth = server_gpus(shape, hardware, reached) * hardware.memory_bandwidth
    a_token = (2 * shape.parameters + kept) / (reached.memory_bandwidth * bandwidth)
    return rounds * work.completion_tokens * a_token


@dataclass(frozen=True)
class Step:
    training_gpus: int
    servers: int
    server_gpus: int  # of each
    pack_tokens: int
    network_gb: float  # received by each training GPU, 1e9 bytes
    compute_seconds: float
    network_seconds: float
    generation_seconds: float
    sync_seconds: float  # bfloat16 weights to the servers, by the link of the first rank

    @property
    def overlapped(self) -> float:
        """Communication hidden behind computation, generation and training in turn."""
        trained = max(self.compute_seconds, self.network_seconds)
        return trained + self.generation_seconds + self.sync_seconds

    @property
    def in_turn(self) -> float:
        """Nothing hidden."""
        trained = self.compute_seconds + self.network_seconds
        return trained + self.generation_seconds + self.sync_seconds


def step(
    shape: Shape, work: Work, ranks: int, servers: int, hardware: Hardware, reached: Reached
) -> Step:
    """`servers` 0: one GPU generates and trains in turn, as `rollout.engine vllm` does."""
    received = network_bytes(shape, work, ranks)
    each = server_gpus(shape, hardware, reached)
    sync = 2 * shape.parameters / link(ranks + servers * each, hardware, reached)
    return Step(
        training_gpus=ranks,
        servers=servers,
        server_gpus=each if servers else 0,
        pack_tokens=pack_tokens(work, ranks),
        network_gb=received / 1e9,
        compute_seconds=compute_seconds(shape, work, ranks, hardware, reached),
        network_seconds=received / link(ranks, hardware, reached),
        generation_seconds=generation_seconds(shape, work, max(servers, 1), hardware, reached),
        sync_seconds=sync if servers else 0.0,
    )


def splits(gpus: int, each: int) -> list[tuple[int, int]]:
    """(training GPUs, servers) to choose among: sixteenths of all train."""
    if gpus == 1:
        return [(1, 0)] if each == 1 else []
    trained = sorted({max(1, gpus * sixteenths // 16) for sixteenths in range(1, 16)})
    return [(ranks, (gpus - ranks) // each) for ranks in trained if (gpus - ranks) // each]


# --- memory ---------------------------------------------------------------------------------------


class Memory:
    """GiB of a training GPU by the plan; a model is traced once for each size of pack."""

    def __init__(self, model: Any, hardware: Hardware, work: Work) -> None:
        self.model, self.hardware, self.work = model, hardware, work
        self.tracers: dict[str, Any] = {}

    def plan(self, ranks: int, engine: str) -> Any:
        config = validate(
            {
                "model": {"weights": "float32", "tile_tokens": 0},
                "data": {"max_prompt_tokens": 500},
                "rollout": {
                    "engine": engine,
                    "prompts_per_step": self.work.questions,
                    "group_size": self.work.group_size,
                    "max_completion_tokens": self.work.completion_tokens,
                },
                "train": {
                    "optimizer": "adamw",
                    "max_tokens_per_microbatch": pack_tokens(self.work, ranks) + 500,
                },
                "replay": {"enabled": False},
            }
        )
        num_bytes = int(self.hardware.memory_bytes)
        planner = Planner(self.model, Machine("cuda", num_bytes, engine, ranks))
        if ranks > 1:  # a pass of one process sees other weights
            planner.tracers = self.tracers
        return planner.plan(config)


# --- the table ------------------------------------------------------------------------------------


def qwen(width: int, mlp: int, layers: int, heads: int, kv_heads: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=152064,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=False,
    )


MODELS = {  # Qwen2.5's published configs
    "7B": qwen(3584, 18944, 28, 28, 4),
    "32B": qwen(5120, 27648, 64, 40, 8),
    "72B": qwen(8192, 29568, 80, 64, 8),
}


def shape_of(model: Qwen2Config, parameters: float) -> Shape:
    head_width = model.hidden_size // model.num_attention_heads
    kv_heads = model.num_key_value_heads or model.num_attention_heads
    kv_bytes = model.num_hidden_layers * kv_heads * head_width * 2 * 2
    return Shape(parameters, model.vocab_size, model.hidden_size, float(kv_bytes))


def best_of(
    name: str, gpus: int, memory: Memory, hardware: Hardware, reached: Reached, work: Work
) -> dict[str, Any]:
    """The split with the quickest step of those that fit; why there is none otherwise."""
    parameters = memory.plan(2, "vllm_server").parameters
    shape = shape_of(MODELS[name], parameters)
    found: tuple[Step, Any] | None = None
    for ranks, servers in splits(gpus, server_gpus(shape, hardware, reached)):
        made = memory.plan(ranks, "vllm_server" if servers else "vllm")
        if made.fits:
            taken = step(shape, work, ranks, servers, hardware, reached)
            if found is None or taken.overlapped < found[0].overlapped:
                found = taken, made
    if found is None:
        return {"model": name, "gpus": gpus, "fits": False}
    taken, made = found
    return {
        "model": name,
        "gpus": gpus,
        "fits": True,
        **asdict(taken),
        "memory_gib": made.peak / GIB,
        "overlapped_seconds": taken.overlapped,
        "in_turn_seconds": taken.in_turn,
    }


def assumptions(hardware: Hardware, reached: Reached, work: Work) -> list[str]:
    return [
        f"{hardware.name}: {hardware.peak_flops:.3g} bfloat16 operations/s, "
        f"{hardware.memory_bandwidth:.3g} B/s of memory (NVIDIA's data sheet); reached: "
        f"{reached.flops:.0%} in passes, {reached.memory_bandwidth:.0%} while decoding",
        f"NVLink {hardware.nvlink:.3g} B/s each way inside a node of {hardware.gpus_a_node} (the "
        f"same), {hardware.network:.3g} B/s a GPU between nodes (400 Gb/s); reached: "
        f"{reached.nvlink:.0%}, {reached.network:.0%}",
        f"a step: {work.questions} x {work.group_size} completions of {work.completion_tokens} "
        f"tokens, {work.updates} update; packs of at most {PACK_TOKENS} tokens",
        f"a server decodes at most {reached.sequences} sequences side by side, as fast on several GPUs "
        f"as their bandwidths together; all completions have full length; generation and training "
        f"take turns",
        "float32 weights and AdamW, sharded; gradient checkpointing; bfloat16 passes",
    ]


def line_of(row: Mapping[str, Any]) -> str:
    if not row["fits"]:
        return f"{row['model']:>4} {row['gpus']:>4}  does not fit"
    return (
        f"{row['model']:>4} {row['gpus']:>4}  {row['training_gpus']:>4} train, {row['servers']:>3} "
        f"servers of {row['server_gpus']}  pack {row['pack_tokens']:>6}  {row['memory_gib']:6.1f} "
        f"GiB  {row['network_gb']:8.1f} GB  compute {row['compute_seconds']:8.1f} s  network "
        f"{row['network_seconds']:7.1f} s  generate {row['generation_seconds']:8.1f} s  step "
        f"{row['overlapped_seconds']:8.1f} to {row['in_turn_seconds']:8.1f} s"
    )


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("bench/results/scale_model.json"))
    arguments = parser.parse_args(words)
    hardware, reached, work = Hardware(), Reached(), Work()
    said = assumptions(hardware, reached, work)
    print(*said, sep="\n")
    rows = []
    for name, model in MODELS.items():
        memory = Memory(model, hardware, work)
        for gpus in WORLD_SIZES:
            rows.append(best_of(name, gpus, memory, hardware, reached, work))
            print(line_of(rows[-1]), flush=True)
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "device": "none: arithmetic",
        "assumptions": said,
        "hardware": asdict(hardware),
        "reached": asdict(reached),
        "work": asdict(work),
        "break_even_tokens": {
            "in a node": break_even_tokens(hardware.gpus_a_node, hardware, reached),
            "between nodes": break_even_tokens(2 * hardware.gpus_a_node, hardware, reached),
        },
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
