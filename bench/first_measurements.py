"""The measurements that decide how the kernels go on; needs a CUDA device.

    PYTHONPATH=kernels python bench/first_measurements.py [--tokens 8192 --vocab 151936] [--out DIR]

1. What the BLAS reaches for the three products of the head, in bfloat16 and with float32 output:
   the ceiling of everything that is built on it.
2. What the row kernel reaches in bytes per second, with one row in flight for each multiprocessor,
   over block sizes, warps and numbers of programs. If the second sweep finds its row in the L2
   cache it moves 2 bytes in and 2 out per logit, else 4 in and 2 out.
3. How much of dlogits a policy needs: the share of 64-column tiles above a share of the mean row
   gradient, on the realistic inputs of `inputs.py`.
The results are JSON; a table is printed. A block-sparse product has its own bench when it exists.
"""

import argparse
import datetime
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from inputs import make_batch

from exgrpo_kernels import PolicyObjective, linear_logprob, rowwise, runtime
from exgrpo_kernels.linear_head import RowInputs
from exgrpo_kernels.objective import LossColumns


def milliseconds(call: Callable[[], object], repeats: int = 15) -> float:
    """Median over repeats, by events, after three to warm up."""
    times = []
    for repeat in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if repeat >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def gemms(rows: int, vocab: int, hidden: int) -> list[dict]:
    """TFLOP/s of logits, dX and dW of one chunk."""
    x = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(vocab, hidden, device="cuda", dtype=torch.bfloat16) / hidden**0.5
    found = []
    for logits_dtype in (torch.bfloat16, torch.float32):
        z = runtime.empty_logits(rows, vocab, logits_dtype, x.device)
        dz = z.view(torch.bfloat16)[:, :vocab]
        dx, dw = torch.empty_like(x), torch.zeros(vocab, hidden, device="cuda")
        calls = {
            "logits": lambda z=z: runtime.logits_into(z, x, w),
            "dX": lambda dz=dz, dx=dx: runtime.hidden_gradient_into(dx, dz, w),
            "dW": lambda dz=dz, dw=dw: runtime.weight_gradient_add(dw, dz, x, overwrite=False),
        }
        for name, call in calls.items():
            ms = milliseconds(call)
            found.append(
                {
                    "gemm": name,
                    "logits": str(logits_dtype).removeprefix("torch."),
                    "rows": rows,
                    "hidden": hidden,
                    "ms": ms,
                    "tflops": 2 * rows * vocab * hidden / ms / 1e9,
                }
            )
    return found


def row_kernel(rows: int, vocab: int) -> list[dict]:
    """GB/s of the policy row kernel at 4 bytes per bfloat16 logit, 6 per float32 one."""
    found = []
    programs = runtime.num_programs(torch.device("cuda"))
    targets = torch.randint(vocab, (rows,), device="cuda")
    vector = torch.full((rows,), 1.0, device="cuda")
    objective = PolicyObjective()
    columns = LossColumns(vector, -12 * vector, vector)
    columns = columns.checked(objective, rows, torch.float32, vector.device)
    inputs = RowInputs(targets)
    grid = itertools.product(
        (torch.bfloat16, torch.float32), (2048, 4096, 8192, 16384), (4, 8, 16), (1, 2, 4)
    )
    for dtype, block, warps, per_sm in grid:
        if not 8 <= block // (32 * warps) <= 64:
            continue
        logits = torch.randn(rows, vocab, device="cuda").to(dtype)
        kernel = rowwise.TritonRows(logits, operand_dtype=torch.bfloat16)
        kernel.shape = runtime.RowKernelShape(block, warps)
        kernel.num_programs = per_sm * programs
        ms = milliseconds(lambda k=kernel: k.policy_gradient(inputs, objective, columns), 7)
        moved = rows * vocab * (dtype.itemsize + 2)
        found.append(
            {
                "logits": str(dtype).removeprefix("torch."),
                "block": block,
                "warps": warps,
                "programs_per_sm": per_sm,
                "ms": ms,
                "gb_per_s": moved / ms / 1e6,
            }
        )
    return sorted(found, key=lambda row: (row["logits"], row["ms"]))


def density(tokens: int, vocab: int, hidden: int) -> list[dict]:
    """Share of 128 x 64 tiles, and of 1 x 64 ones, whose |dz| mass reaches theta * mean |c1|."""
    arguments = argparse.Namespace(
        tokens=tokens,
        vocab=vocab,
        hidden=hidden,
        dtype="bfloat16",
        device="cuda",
        inputs="realistic",
        zero_advantages=0.0,
        seed=0,
    )
    batch = make_batch(arguments)
    out = linear_logprob(batch.hidden.detach(), batch.weight.detach(), batch.targets)
    logits = (batch.hidden @ batch.weight.t()).detach().float()
    rows = rowwise.TritonRows(logits, operand_dtype=torch.float32, keeps_masses=True)
    objective = PolicyObjective(surrogate="reinforce")
    ones = torch.ones(tokens, device="cuda")
    columns = LossColumns(ones, ones, ones).checked(objective, tokens, torch.float32, ones.device)
    rows.policy_gradient(RowInputs(batch.targets), objective, columns)
    assert rows.masses is not None
    masses, found = rows.masses, []
    order = torch.argsort(out.logprobs)
    for theta in (1e-3, 3e-4, 1e-4, 3e-5):
        tiles = masses[: tokens // 128 * 128] >= theta
        ordered = (masses[order] >= theta)[: tokens // 128 * 128]
        found.append(
            {
                "theta": theta,
                "rows": float(tiles.float().mean()),
                "tiles_128": float(tiles.view(-1, 128, tiles.shape[1]).any(1).float().mean()),
                "tiles_128_by_confidence": float(
                    ordered.view(-1, 128, tiles.shape[1]).any(1).float().mean()
                ),
                "skipped_mass": float(masses[masses < theta].sum() / masses.sum()),
                "mean_entropy": float(out.entropy.mean()),
            }
        )
    return found


def show(title: str, rows: list[dict]) -> None:
    print(title)
    for row in rows:
        cells = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print("  " + "  ".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, nargs="+", default=[1536, 4096])
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "first_measurements.py: needs a CUDA device\n")
    chunks = sorted({min(2048, arguments.tokens), min(4096, arguments.tokens)})
    pairs = itertools.product(chunks, arguments.hidden)
    results = {
        "bench": "first_measurements",
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "vocab": arguments.vocab,
        "gemms": [row for c, d in pairs for row in gemms(c, arguments.vocab, d)],
        "row_kernel": row_kernel(min(4096, arguments.tokens), arguments.vocab),
        "density": density(min(2048, arguments.tokens), arguments.vocab, arguments.hidden[0]),
    }
    for name in ("gemms", "row_kernel", "density"):
        show(name, results[name])
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "first_measurements.json"
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
