"""What does the compiler make of the kernels? Compiled ahead of time, no GPU needed.

    PYTHONPATH=kernels python bench/aot.py [--targets 80 89 90 100] [--only policy] [--out DIR]

Every launch that the launchers would make is recorded, with the types and alignments that a launch
derives, and compiled to machine code for each target by the compiler inside Triton. Register
spills, serialized matrix instructions and shared memory over the chip's limit are failures (exit
1): on a GPU they would show as a slow kernel or a launch that fails, here they show as a row.
What this cannot say: time, races, and the accuracy of approximate instructions.
"""

import argparse
import atexit
import contextlib
import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    sys.exit("bench/aot.py: unset TRITON_INTERPRET, interpreted kernels cannot be compiled")
if "TRITON_CACHE_DIR" not in os.environ:
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="aot-")
    atexit.register(shutil.rmtree, os.environ["TRITON_CACHE_DIR"], ignore_errors=True)

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from exgrpo_kernels import PolicyObjective, rowwise, runtime, sparse_kernels
from exgrpo_kernels.linear_head import LinearLogprob, RowCoefficients, RowInputs
from exgrpo_kernels.objective import LossColumns

# Bytes of shared memory a block may have: CUDA C++ programming guide, technical specifications.
SHARED_LIMIT = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
TARGETS = (80, 89, 90, 100)
TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Launch(NamedTuple):
    """One kernel as a launcher calls it."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple, Any]
    attributes: dict[tuple, list]
    options: dict[str, int]
    target: int | None = None  # only this one; None: all


# ---- the launches of the row kernels -------------------------------------------------------------


class Recorder(rowwise.TritonRows):
    """Keeps the launches instead of making them."""

    name: str
    launches: list[Launch]

    def launch(self, kernel, num_rows: int, *arguments, **constants) -> None:
        names = kernel.arg_names
        values = dict(zip(names, arguments, strict=False)) | constants
        values["BLOCK"] = self.shape.block
        name = f"{kernel.fn.__name__.removesuffix('_kernel')} {self.name}"
        options = {"num_warps": self.shape.num_warps, "maxnreg": self.shape.max_registers}
        self.launches.append(specialised(name, kernel, values, options))


def specialised(
    name: str,
    kernel: Any,
    values: dict[str, Any],
    options: dict[str, int],
    target: int | None = None,
) -> Launch:
    """Types, constants and alignments, found by Triton's own launcher."""
    backend = make_backend(GPUTarget("cuda", 80, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(**values)
    packed = kernel._pack_args(backend, {}, bound, specialization, {})
    _, signature, constants, attributes = packed
    return Launch(name, kernel, signature, constants, attributes, options, target)


BF16, FP32 = torch.bfloat16, torch.float32
PLACES = {"bf16": (BF16, BF16), "fp32 to bf16": (FP32, BF16), "fp32": (FP32, FP32)}
LOSSES = {
    "clip": {},
    "cispo k1": {"surrogate": "cispo", "kl_coef": 0.1, "kl_estimator": "k1"},
    "sapo k2": {"surrogate": "sapo", "kl_coef": 0.1, "kl_estimator": "k2"},
    "reinforce": {"surrogate": "reinforce"},
    "dppo k2": {"clip_low": None, "clip_high": None, "tv_low": 0.2, "tv_high": 0.2}
    | {"kl_coef": 2e-3, "kl_estimator": "k2"},
    "clip k3_ratio": {"kl_coef": 0.1, "kl_estimator": "k3_ratio"},
    "clip abs": {"kl_coef": 0.1, "kl_estimator": "abs"},
    "clip k3": {"dual_clip": 3.0, "kl_coef": 0.1, "kl_estimator": "k3", "entropy_coef": 0.01},
}


def row_launches() -> list[Launch]:
    """Every row kernel in every dtype, with nothing optional and with all of it, and every loss."""
    launches: list[Launch] = []
    for place, (logits_dtype, gradient_dtype) in PLACES.items():
        for vocab in (151_936, 300):
            for full in (False, True):
                label = f"{place}, V={vocab}, {'all options' if full else 'plain'}"
                losses = ["clip k3" if full else "clip"]
                if vocab == 151_936 and place == "bf16" and not full:
                    losses = [name for name in LOSSES if name != "clip k3"]
                if vocab == 300 and place != "bf16":
                    continue
                launches += launches_of(label, logits_dtype, gradient_dtype, vocab, full, losses)
    return launches


def launches_of(
    label: str,
    logits_dtype: torch.dtype,
    gradient_dtype: torch.dtype,
    vocab: int,
    full: bool,
    losses: list[str],
    *,
    num_rows: int = 2,
    offset: int = 0,
) -> list[Launch]:
    """Launches for `num_rows` rows whose columns start at element `offset` of a longer vector."""
    logits = torch.empty(max(2, num_rows), vocab, dtype=logits_dtype)
    rows = Recorder(logits, operand_dtype=gradient_dtype, keeps_masses=full)
    rows.launches, rows.name = [], label
    vector = torch.ones(offset + num_rows)[offset:]
    inputs = RowInputs(
        torch.zeros(offset + num_rows, dtype=torch.int64)[offset:],
        torch.zeros(vocab) if full else None,
        vector if full else 1.0,
        30.0 if full else None,
    )
    rows.statistics(inputs)
    extra = vector if full else None
    statistics = LinearLogprob(vector, vector, vector)
    rows.gradient(inputs, statistics, RowCoefficients(vector, extra, extra))
    for loss in losses:
        rows.name = f"{label}, {loss}"
        objective = PolicyObjective(**LOSSES[loss])
        ref_logprobs = vector if objective.kl_coef else None
        columns = LossColumns(vector, vector, vector, extra, ref_logprobs, kl_weights=extra)
        columns = columns.checked(objective, num_rows, FP32, vector.device)
        rows.policy_gradient(inputs, objective, columns)
    return rows.launches


# ---- the launches of the block-sparse products -------------------------------------------------


# (dtype of the gradient, dtype of the head, hidden size); a float16 or mixed head computes in float32
PRODUCTS = (
    (BF16, BF16, 1536),
    (BF16, BF16, 96),
    (FP32, FP32, 1536),
    (FP32, torch.float16, 1536),
    (FP32, BF16, 1536),
)


def sparse_launches(
    chips: Iterable[int] = tuple(SHARED_LIMIT), products=PRODUCTS, num_rows: int = 256
) -> list[Launch]:
    """Both products in every pair of dtypes, with the shape that each chip's memory allows."""
    launches: list[Launch] = []

    def record(kernel, num_work, device, *arguments, **constants):
        options = {
            n: constants.pop(n) for n in ("num_warps", "num_stages", "maxnreg") if n in constants
        }
        names = [n for n in kernel.arg_names if n not in constants]
        values = dict(zip(names, arguments, strict=True)) | constants
        name = f"{kernel.fn.__name__.removesuffix('_kernel')} {label}"
        launches.append(specialised(name, kernel, values, options, target))

    def shape(num_hidden: int, dtype: torch.dtype, device: torch.device):
        return runtime.sparse_shape_for(num_hidden, dtype.itemsize, SHARED_LIMIT[target])

    saved = sparse_kernels.launch, runtime.sparse_kernel_shape
    sparse_kernels.launch = record
    runtime.sparse_kernel_shape = shape
    for chip in chips:
        target = chip
        for dtype, weight_dtype, hidden in products:
            label = f"{TYPE_NAMES[dtype]} x {TYPE_NAMES[weight_dtype]}, D={hidden}"
            weight = torch.empty(320, hidden, dtype=weight_dtype)
            states = torch.empty(num_rows, hidden, dtype=dtype)
            dlogits = torch.empty(num_rows, 320, dtype=dtype)
            kept = torch.ones(-(-num_rows // 128), 5, dtype=torch.bool)
            sparse_kernels.hidden_gradient_into(torch.empty_like(states), dlogits, weight, kept)
            if weight_dtype != dtype:
                continue  # dW multiplies the hidden states in the dtype of the gradient
            total = torch.empty(320, hidden)
            for overwrite in (False, True):
                label = f"{TYPE_NAMES[dtype]}, D={hidden}{', overwrites' if overwrite else ''}"
                sparse_kernels.weight_gradient_add(
                    total, dlogits, states, kept, overwrite=overwrite
                )
    sparse_kernels.launch, runtime.sparse_kernel_shape = saved
    return launches


# ---- compiling -----------------------------------------------------------------------------------


def compiled(job: tuple[int, int]) -> dict[str, Any]:
    """Compile one launch for one target; the row says what came out and what is wrong with it."""
    launch, target = LAUNCHES[job[0]], job[1]
    row: dict[str, Any] = {"kernel": launch.name, "target": f"sm_{target}"}
    knobs.compilation.always_compile = True
    knobs.nvidia.dump_ptxas_log = True
    log = io.StringIO()
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    try:
        with contextlib.redirect_stdout(log):
            kernel = triton.compile(
                source,
                target=GPUTarget("cuda", target, 32),
                options=launch.options,
            )
    except Exception as error:
        return row | {"problems": [f"{type(error).__name__}: {str(error)[-300:]}"]}
    text = log.getvalue()
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    row |= {
        "warps": launch.options["num_warps"],
        "registers": registers(kernel.asm["cubin"]),
        "spill_bytes": int(spills[1]) + int(spills[2]) if spills else None,
        "shared_bytes": kernel.metadata.shared,
        "serialized": "wgmma" in text and "serialized" in text,
    }
    problems = []
    if row["spill_bytes"] is None:
        problems.append("ptxas said nothing of spills")
    elif row["spill_bytes"] > 0:
        problems.append(f"spills {row['spill_bytes']} bytes")
    if row["shared_bytes"] > SHARED_LIMIT[target]:
        problems.append(f"shared memory {row['shared_bytes']} > {SHARED_LIMIT[target]}")
    if row["serialized"]:
        problems.append("matrix instructions are serialized")
    return row | {"problems": problems}


def registers(cubin: bytes) -> int:
    """Registers per thread, as the binary says."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(number) for number in re.findall(r"REG:(\d+)", usage))


LAUNCHES: list[Launch] = []


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS, choices=SHARED_LIMIT)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="folder for triton-VERSION.json")
    arguments = parser.parse_args()

    every = [*row_launches(), *sparse_launches()]
    LAUNCHES.extend(launch for launch in every if arguments.only in launch.name)
    jobs = [
        (i, target)
        for i, launch in enumerate(LAUNCHES)
        for target in arguments.targets
        if launch.target in (None, target)
    ]
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(arguments.jobs, mp_context=fork) as pool:
        table = list(pool.map(compiled, jobs))

    width = max(len(launch.name) for launch in LAUNCHES)
    print(f"triton {triton.__version__}: {len(jobs)} launches, targets {arguments.targets}")
    print(f"{'kernel':{width}}  target  warps  regs  spills  shared")
    for row in table:
        figures = [
            row.get(key, "-") for key in ("warps", "registers", "spill_bytes", "shared_bytes")
        ]
        print(f"{row['kernel']:{width}}  {row['target']:6}", end="")
        print("  {:>5}  {:>4}  {:>6}  {:>6}".format(*map(str, figures)), *row["problems"])
    bad = [row for row in table if row["problems"]]
    print(f"{len(table) - len(bad)} compiled clean, {len(bad)} with problems")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        result = {"bench": "aot", "triton": triton.__version__, "torch": torch.__version__}
        text = json.dumps(result | {"rows": table}, indent=1)
        (arguments.out / f"triton-{triton.__version__}.json").write_text(text + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
