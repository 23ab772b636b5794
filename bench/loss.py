"""How fast is the fused policy loss, and what does it hold in memory?

    PYTHONPATH=kernels python bench/loss.py [--tokens 4096 --vocab 32768 --hidden 512]

Every provider of `peers.py` that can run does the same work: the PPO clip loss of N tokens from
their hidden states, and the gradients of hidden states and weight. They run interleaved,
round-robin, in one process; a machine that slows down slows all of them.
The last line of stdout is JSON; --out gives the folder of loss.json and loss.png.

Legend: N tokens, V vocabulary, D hidden.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from figures import draw, print_table
from inputs import DTYPES, Batch, make_batch
from peers import PROVIDERS, Outcome
from torch import Tensor

from exgrpo_kernels import linear_logprob

PACKAGES = ("triton", "liger-kernel", "trl", "verl", "cut-cross-entropy", "quack-kernels")
CASES = {"without entropy gradient": 0.0, "with entropy gradient": 1e-3}


# ---- one run -------------------------------------------------------------------------------------


def forward(provider: str, batch: Batch, entropy_coef: float) -> Outcome:
    batch.hidden.grad = batch.weight.grad = None
    return PROVIDERS[provider].run(batch, entropy_coef)


def backward(outcome: Outcome) -> None:
    if outcome[0].requires_grad:
        outcome[0].backward()


def run(provider: str, batch: Batch, entropy_coef: float) -> Outcome:
    outcome = forward(provider, batch, entropy_coef)
    backward(outcome)
    return outcome


class Times(NamedTuple):
    """Milliseconds."""

    forward: float
    full: float


def timed(provider: str, batch: Batch, entropy_coef: float) -> Times:
    """One forward and backward; on CUDA by events, without a wait in between."""
    if batch.hidden.is_cuda:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        outcome = forward(provider, batch, entropy_coef)
        marks[1].record()
        backward(outcome)
        marks[2].record()
        torch.cuda.synchronize()
        return Times(marks[0].elapsed_time(marks[1]), marks[0].elapsed_time(marks[2]))
    start = time.perf_counter()
    outcome = forward(provider, batch, entropy_coef)
    middle = time.perf_counter()
    backward(outcome)
    return Times(1e3 * (middle - start), 1e3 * (time.perf_counter() - start))


# ---- memory --------------------------------------------------------------------------------------


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_extra_bytes(provider: str, batch: Batch, entropy_coef: float) -> int:
    """What one forward and backward adds to the inputs at its peak, gradients included.

    CUDA: the allocator's own maximum. CPU: the peak resident set, in a process that does nothing
    else (see `peak_in_subprocess`), because it counts what every library allocates, GEMM
    workspaces included, and only pages that were really used. The kernel's high-water mark is
    reset after the inputs exist and the thread pools have run.
    """
    if batch.hidden.is_cuda:
        run(provider, batch, entropy_coef)
        batch.hidden.grad = batch.weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(provider, batch, entropy_coef)
        return torch.cuda.max_memory_allocated() - before
    small = Batch(
        batch.hidden[:2, :8].detach().clone().requires_grad_(),
        batch.weight[:64, :8].detach().clone().requires_grad_(),
        batch.targets[:2] % 64,
        *(column[:2] for column in batch[3:]),
    )
    run(provider, small, entropy_coef)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    before = resident("VmRSS")
    run(provider, batch, entropy_coef)
    return resident("VmHWM") - before


def peak_in_subprocess(provider: str, batch_file: Path, entropy_coef: float) -> int | None:
    """`peak_extra_bytes` in a fresh process with the saved batch; None where it cannot run."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, __file__, "--batch-file", str(batch_file), "--peak-of", provider]
    command += ["--peak-entropy", str(entropy_coef)]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(finished.stdout.splitlines()[-1])["peak_extra_bytes"]


def peaks(batch: Batch, runs: list[tuple[str, str]]) -> list[int | None]:
    """Peak extra bytes of every (case, provider)."""
    if batch.hidden.is_cuda:
        return [peak_extra_bytes(provider, batch, CASES[case]) for case, provider in runs]
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "batch.pt"
        torch.save(tuple(t.detach() for t in batch), saved)
        return [peak_in_subprocess(provider, saved, CASES[case]) for case, provider in runs]


# ---- error ---------------------------------------------------------------------------------------


class Truth(NamedTuple):
    logprobs: Tensor
    entropy: Tensor
    hidden_grad: Tensor
    weight_grad: Tensor


def first_rows(batch: Batch, dtype: torch.dtype, rows: int = 256) -> Batch:
    """A batch of the first rows with the head in `dtype` and float columns no narrower."""
    hidden, weight = (t.detach().to(dtype) for t in (batch.hidden[:rows], batch.weight))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    columns = (column[:rows].to(wide) for column in batch[3:])
    return Batch(hidden.requires_grad_(), weight.requires_grad_(), batch.targets[:rows], *columns)


def truth(batch: Batch, entropy_coef: float) -> Truth:
    """float64 on the first rows."""
    exact = first_rows(batch, torch.float64)
    _, logprobs, entropy = run("naive", exact, entropy_coef)
    assert logprobs is not None and entropy is not None
    assert exact.hidden.grad is not None and exact.weight.grad is not None
    return Truth(logprobs.detach(), entropy.detach(), exact.hidden.grad, exact.weight.grad)


def errors(provider: str, batch: Batch, entropy_coef: float, exact: Truth) -> dict:
    """On the same rows: largest error of the vectors, relative Frobenius error of dX and dW.

    None where a provider gives nothing to compare: no vectors, or not this loss.
    """
    small = first_rows(batch, batch.hidden.dtype)
    _, logprobs, entropy = run(provider, small, entropy_coef)

    def largest(value: Tensor | None, expected: Tensor) -> float | None:
        return None if value is None else float((value.detach() - expected).abs().max())

    def relative(gradient: Tensor | None, expected: Tensor) -> float | None:
        if gradient is None or logprobs is None:
            return None
        return float((gradient - expected).norm() / expected.norm())

    return {
        "logprobs_max": largest(logprobs, exact.logprobs),
        "entropy_max": largest(entropy, exact.entropy),
        "hidden_grad_rel": relative(small.hidden.grad, exact.hidden_grad),
        "weight_grad_rel": relative(small.weight.grad, exact.weight_grad),
    }


# ---- everything ----------------------------------------------------------------------------------


def machine(device: str) -> dict[str, str | int]:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
        cpu = names[0].split(":")[1].strip() if names else cpu
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": cpu,
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{name: version for name in PACKAGES if (version := installed(name))},
    }


def installed(name: str) -> str | None:
    """The version of a package, None where it is absent."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def runnable(batch: Batch, only: list[str] | None) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Every (case, provider) that runs, and of every other provider the reason."""
    runs, reasons = [], {}
    for case, entropy_coef in CASES.items():
        for name, provider in PROVIDERS.items():
            if only and name not in only and name != "naive":
                continue
            reason = provider.unavailable(batch.hidden.is_cuda, entropy_coef)
            if reason is None:
                reason = first_error(
                    lambda n=name, c=entropy_coef: run(n, first_rows(batch, batch.hidden.dtype), c)
                )
            if reason is None:
                runs.append((case, name))
            else:
                reasons[f"{name}, {case}"] = reason
    return runs, reasons


def first_error(call: Callable[[], object]) -> str | None:
    try:
        call()
    except Exception as error:  # a peer may fail in any way, and the table has to say how
        return f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
    return None


def measure(arguments: argparse.Namespace) -> dict:
    batch = make_batch(arguments)
    entropy = linear_logprob(batch.hidden.detach(), batch.weight.detach(), batch.targets).entropy
    runs, reasons = runnable(batch, arguments.only)
    times: dict[tuple[str, str], list[Times]] = {key: [] for key in runs}
    for repeat in range(arguments.repeats + 1):
        for case, provider in runs:
            spent = timed(provider, batch, CASES[case])
            if repeat > 0:  # the first round warms up
                times[case, provider].append(spent)
    load_average = os.getloadavg()[0]  # above `threads`: other processes slowed this one
    exact = {case: truth(batch, coef) for case, coef in CASES.items()}
    gemm_flops = 6 * arguments.tokens * arguments.vocab * arguments.hidden
    floor = [t.full for t in times.get((next(iter(CASES)), "three GEMMs, no loss"), [])]
    rows = []
    for (case, provider), peak in zip(runs, peaks(batch, runs), strict=True):
        full, of_naive = (
            [t.full for t in times[case, provider]],
            [t.full for t in times[case, "naive"]],
        )
        median = statistics.median(full)
        row = {
            "case": case,
            "provider": provider,
            "median_ms": median,
            "fastest_ms": min(full),
            "forward_ms": statistics.median(t.forward for t in times[case, provider]),
            "backward_ms": statistics.median(t.full - t.forward for t in times[case, provider]),
            # round by round, so that a slow minute weighs on both sides of the quotient
            "time_to_naive": statistics.median(a / b for a, b in zip(full, of_naive, strict=True)),
            "fastest_to_naive": min(full) / min(of_naive),
            "share_of_three_gemms": median / statistics.median(floor) if floor else None,
            "tflops_at_6nvd": gemm_flops / median / 1e9,
            "peak_extra_mib": None if peak is None else peak / 2**20,
            **errors(provider, batch, CASES[case], exact[case]),
        }
        first = next((r for r in rows if r["case"] == case), row)
        base = first["peak_extra_mib"]
        row["memory_to_naive"] = None if base is None else row["peak_extra_mib"] / base
        rows.append(row)
    shape = {k: getattr(arguments, k) for k in ("tokens", "vocab", "hidden", "dtype", "inputs")}
    return {
        "bench": "loss",
        "date": datetime.date.today().isoformat(),
        **machine(arguments.device),
        **shape,
        "zero_advantages": arguments.zero_advantages,
        "repeats": arguments.repeats,
        "load_average": round(load_average, 2),
        "mean_entropy": float(entropy.mean()),
        "rows": rows,
        "not_run": reasons,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of the policy loss.")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--inputs", choices=("realistic", "random"), default="realistic")
    parser.add_argument("--zero-advantages", type=float, default=0.0, help="share of rows with A=0")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=PROVIDERS, help="these providers and naive")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="loss", help="NAME.json and NAME.png")
    parser.add_argument("--out", type=Path, help="default: bench/results/<device>")
    parser.add_argument("--batch-file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--peak-of", choices=PROVIDERS, help=argparse.SUPPRESS)
    parser.add_argument("--peak-entropy", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        batch = Batch(*torch.load(arguments.batch_file))
        batch.hidden.requires_grad_()
        batch.weight.requires_grad_()
        peak = peak_extra_bytes(arguments.peak_of, batch, arguments.peak_entropy)
        print(json.dumps({"peak_extra_bytes": peak}))
        return
    results = measure(arguments)
    print_table(results)
    device = results["device"].lower().replace(" ", "-")
    out = arguments.out or Path(__file__).parent / "results" / device
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{arguments.name}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    draw(json.loads(path.read_text()), path.with_suffix(".png"))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
