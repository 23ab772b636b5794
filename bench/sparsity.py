"""How much of the logit gradient can be left out, by which rule, and when does it pay?

    PYTHONPATH=kernels python bench/sparsity.py [--tokens 2048 --vocab 32768 --hidden 256]

1. Rules. On the realistic inputs of `inputs.py`, tiles of 128 x 64 are kept by gradient mass (ours) or
   by the largest element (what cut-cross-entropy filters by, with the target's tile always kept),
   with rows in natural order and in ours, and what is dropped is left out, put back as one value
   per tile, or as one value per row along the mean of W. Density and error of dX and dW of each.
2. Break-even. Time of the sparse products of plain PyTorch beside the dense ones, over densities
   of random bitmaps: where `runtime.BREAK_EVEN_DENSITY` of a CPU comes from.
The results are JSON and a figure; on a GPU the second part is `gpu.py tiles`.
"""

import argparse
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from figures import panels
from inputs import make_batch
from torch import Tensor

from exgrpo_kernels import PolicyObjective, linear_logprob, runtime, sparse_backward
from exgrpo_kernels.objective import LossColumns
from exgrpo_kernels.policy_loss import row_order
from exgrpo_kernels.sparse_backward import COLUMNS, ROWS

DEVIATIONS = ("drop", "centroid", "rank one")


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


def tile_maxima(values_RV: Tensor) -> Tensor:
    """(R, V) -> (R, T): the largest value of each tile."""
    padding = -values_RV.shape[1] % COLUMNS
    padded = torch.nn.functional.pad(values_RV, (0, padding))
    return padded.unflatten(1, (-1, COLUMNS)).amax(-1)


def kept_by_maximum(dz_RV: Tensor, targets: Tensor, c1: Tensor, epsilon: float) -> Tensor:
    """(G, T): any element of |dz| / |c1| above epsilon, or a target."""
    relative_dz = dz_RV.abs() / c1.abs().clamp(min=1e-30)[:, None]
    keeps = tile_maxima(relative_dz) > epsilon
    keeps[torch.arange(len(targets)), targets // COLUMNS] = True
    keeps &= (c1 != 0)[:, None]
    padding = -len(keeps) % ROWS
    return torch.nn.functional.pad(keeps, (0, 0, 0, padding)).unflatten(0, (-1, ROWS)).any(1)


def rules(arguments: argparse.Namespace) -> tuple[list[dict], dict]:
    batch = make_batch(arguments)
    hidden, weight = batch.hidden.detach(), batch.weight.detach()
    n, v = len(hidden), len(weight)
    out = linear_logprob(hidden, weight, batch.targets)
    objective = PolicyObjective()
    columns = LossColumns(batch.advantages, batch.behaviour_logprobs, batch.weights)
    columns = columns.checked(objective, n, torch.float32, hidden.device)
    c1 = -batch.advantages * batch.weights
    mean = sparse_backward.mean_coefficient(c1, c1 != 0)
    natural = torch.arange(n)
    rows = []
    for order_name, order in (
        ("natural", natural),
        ("confidence, target", row_order(objective, columns, batch.targets)),
    ):
        h, targets, c = hidden[order], batch.targets[order], c1[order]
        dz = torch.softmax(h @ weight.t(), -1).mul_(-c[:, None])
        dz[natural, targets] = -c * torch.expm1(out.logprobs[order])
        dx, dw = dz @ weight, dz.t() @ h
        masses, sums = sparse_backward.tile_sums(dz.abs()), sparse_backward.tile_sums(dz)
        mean_row = weight.mean(0)
        choices = [
            ("mass", t, sparse_backward.keep_tiles(masses, mean, t))
            for t in (1e-3, 3e-4, 1e-4, 3e-5)
        ]
        choices += [
            (f"largest element 2^{e}", 2.0**e, kept_by_maximum(dz, targets, c, 2.0**e))
            for e in (-8, -10, -12, -14)
        ]
        for rule, threshold, kept in choices:
            masked = sparse_backward.masked_reference(dz, kept)
            residue = sparse_backward.residues(sums, kept)
            dropped = masked @ weight
            ours = {
                "drop": dropped,
                "centroid": dropped + sparse_backward.Centroids().of_hidden(residue, weight),
                "rank one": dropped + residue.sum(1, keepdim=True) * mean_row,
            }
            row = {
                "order": order_name,
                "rule": rule.split(" 2^")[0],
                "threshold": threshold,
                "density": float(kept.double().mean()),
                "skipped_mass": float(sparse_backward.residues(masses, kept).sum() / masses.sum()),
                "dw": relative(masked.t() @ h, dw),
            }
            rows.append(row | {f"dx {name}": relative(ours[name], dx) for name in DEVIATIONS})
    low = dz.to(torch.bfloat16).float()
    yardstick = {
        "dx of dz rounded to bfloat16": relative(low @ weight, dx),
        "dw of dz rounded to bfloat16": relative(low.t() @ h, dw),
        "mean entropy": float(out.entropy.mean()),
        "vocab": v,
    }
    return rows, yardstick


def fastest(call: Callable[[], object], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def break_even(rows: int, vocab: int, hidden: int) -> list[dict]:
    """Seconds of both products of one chunk, sparse and dense."""
    dz = runtime.empty_logits(rows, vocab, torch.float32, torch.device("cpu")).normal_()
    w, h = torch.randn(vocab, hidden), torch.randn(rows, hidden)
    dx, dw = torch.empty(rows, hidden), torch.zeros(vocab, hidden)
    groups, tiles = -(-rows // ROWS), sparse_backward.num_tiles(vocab)

    def dense() -> None:
        runtime.hidden_gradient_into(dx, dz, w)
        runtime.weight_gradient_add(dw, dz, h, overwrite=False)

    found = []
    for density in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8):
        kept = torch.rand(groups, tiles, generator=torch.Generator().manual_seed(0)) < density

        def sparse(kept: Tensor = kept) -> None:
            sparse_backward.hidden_gradient_into(dx, dz, w, kept)
            sparse_backward.weight_gradient_add(dw, dz, h, kept, overwrite=False)

        sparse()
        ours, whole = fastest(sparse), fastest(dense)
        found.append({"density": density, "to_dense": ours / whole, "dense_ms": 1e3 * whole})
    return found


def draw(results: dict, path: Path) -> None:
    """Error over density for the rules, and time over density."""
    with panels(path, size=(11, 4)) as axes:
        styles = {"mass": "o-", "largest element": "s--"}
        for (order, rule), colour in zip(
            ((o, r) for o in ("natural", "confidence, target") for r in styles),
            ("#9bb8cd", "#e8c39e", "#2a6f97", "#e09f3e"),
            strict=True,
        ):
            points = [r for r in results["rules"] if (r["order"], r["rule"]) == (order, rule)]
            label = f"{rule}, {'natural order' if order == 'natural' else 'sorted rows'}"
            densities = [p["density"] for p in points]
            axes[0].plot(
                densities, [p["dx drop"] for p in points], styles[rule], c=colour, label=label
            )
        level = results["yardstick"]["dx of dz rounded to bfloat16"]
        axes[0].axhline(level, color="grey", lw=0.8)
        beside = axes[0].get_yaxis_transform()
        text = "rounding dz to bfloat16"
        axes[0].text(
            0.98, level * 1.05, text, transform=beside, ha="right", fontsize=8, color="grey"
        )
        axes[0].set(xlabel="density of kept tiles", ylabel="relative error of dX", yscale="log")
        axes[0].legend(frameon=False, fontsize=8)
        points = results["break_even"]
        axes[1].plot(
            [p["density"] for p in points], [p["to_dense"] for p in points], "o-", c="#2a6f97"
        )
        axes[1].axhline(1.0, color="grey", lw=0.8)
        axes[1].set(xlabel="density of kept tiles", ylabel="time of dX and dW, dense = 1")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu")
    arguments = parser.parse_args()
    arguments.inputs, arguments.dtype, arguments.device = "realistic", "float32", "cpu"
    arguments.zero_advantages = 0.0
    found, yardstick = rules(arguments)
    results = {
        "bench": "sparsity",
        "date": datetime.date.today().isoformat(),
        "device": "cpu",
        "torch": torch.__version__,
        "tokens": arguments.tokens,
        "hidden": arguments.hidden,
        "load_average": round(os.getloadavg()[0], 2),
        "yardstick": yardstick,
        "rules": found,
        "break_even": break_even(384, arguments.vocab, 512),
    }
    for row in found:
        print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else v for k, v in row.items()))
    print(yardstick)
    for row in results["break_even"]:
        print("  ".join(f"{k} {v:.3g}" for k, v in row.items()))
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "sparsity.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    draw(json.loads(path.read_text()), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
