"""Panels for the figures of all benchmarks; table and figure of bench/loss.py, from its JSON alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

COLUMNS = (
    ("median_ms", "ms", "9.1f"),
    ("forward_ms", "forward", "9.1f"),
    ("backward_ms", "backward", "9.1f"),
    ("time_to_naive", "x naive", "8.3f"),
    ("share_of_three_gemms", "x GEMMs", "8.2f"),
    ("tflops_at_6nvd", "TFLOP/s", "8.2f"),
    ("peak_extra_mib", "MiB", "8.0f"),
    ("memory_to_naive", "x naive", "8.3f"),
    ("logprobs_max", "logp", "8.1e"),
    ("entropy_max", "H", "8.1e"),
    ("hidden_grad_rel", "dX", "8.1e"),
    ("weight_grad_rel", "dW", "8.1e"),
)


@contextlib.contextmanager
def panels(
    path: Path, count: int = 2, *, size: tuple[float, float], title: str = "", sharey: bool = False
) -> Iterator[Any]:
    """Axes side by side; what the block draws on them is written to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, count, figsize=size, sharey=sharey)
    yield axes
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def print_table(results: dict) -> None:
    """One line per case and provider; "-" where there is nothing to measure."""
    cases = dict.fromkeys(row["case"] for row in results["rows"])
    print(" " * 34, *(f"{title:>{int(form[0])}}" for _, title, form in COLUMNS))
    for case in cases:
        print(f"{case}, error against float64 at the right")
        for row in (r for r in results["rows"] if r["case"] == case):
            cells = (
                "-".rjust(int(form[0])) if row[name] is None else f"{row[name]:{form}}"
                for name, _, form in COLUMNS
            )
            print(f"  {row['provider']:32}", *cells)
    for provider, reason in results["not_run"].items():
        print(f"not run: {provider}: {reason}")


def draw(results: dict, path: Path) -> None:
    """Two panels from the JSON alone: time and peak memory beside naive PyTorch."""
    providers = list(dict.fromkeys(row["provider"] for row in results["rows"]))
    title = (
        f"policy loss, N={results['tokens']} V={results['vocab']} D={results['hidden']} "
        f"{results['dtype']}, {results['inputs']} inputs, {results['device']} "
        f"({results['threads']} threads), torch {results['torch']}"
    )
    size = (11, 1.2 + 0.6 * len(providers))
    with panels(path, size=size, title=title, sharey=True) as axes:
        cases = list(dict.fromkeys(row["case"] for row in results["rows"]))
        for offset, (case, colour) in enumerate(zip(cases, ("#2a6f97", "#e09f3e"), strict=True)):
            rows = {row["provider"]: row for row in results["rows"] if row["case"] == case}
            places = [i + 0.38 * offset for i in range(len(providers))]
            for axis, value, share in (
                (axes[0], "median_ms", "time_to_naive"),
                (axes[1], "peak_extra_mib", "memory_to_naive"),
            ):
                lengths = [rows.get(p, {}).get(value) or 0.0 for p in providers]
                bars = axis.barh(places, lengths, height=0.36, color=colour, label=case)
                found = [rows.get(p, {}).get(share) for p in providers]
                shares = [f" {x:.2f}x" if x else "" for x in found]
                axis.bar_label(bars, shares, fontsize=8)
                axis.margins(x=0.12)
        axes[0].set_yticks([i + 0.19 for i in range(len(providers))], providers)
        axes[0].invert_yaxis()
        axes[0].set_xlabel("forward + backward, median ms")
        axes[1].set_xlabel("peak extra memory, MiB")
        axes[1].legend(frameon=False, loc="lower right")
