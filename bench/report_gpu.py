"""results.jsonl of `gpu.py` -> tables in Markdown, each figure beside its prediction.

    python bench/report_gpu.py bench/results/<device>/results.jsonl

The tables are those of docs/kernels.md (full passes, correctness), docs/memory.md (peaks beside the
plan) and bench/NOTES.md (ceilings, sweeps). What failed or was not measured is said.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# bench/NOTES.md, for an H200 at V = 151936, T = 8192: milliseconds forward and backward
PREDICTED_MS = {
    "three GEMMs, no loss": {1536: 14.5, 2048: 19.4, 3584: 33.9, 4096: 38.7},
    "linear_policy_loss, bf16 logits": {1536: 16.8, 2048: 21.7, 3584: 36.4, 4096: 41.3},
    "linear_policy_loss, dense": {1536: 19.1, 2048: 24.0, 3584: 38.7, 4096: 43.7},
    "linear_logprob + policy_loss": {1536: 22.2, 2048: 28.7, 3584: 48.3, 4096: 54.8},
}
PREDICTED = {"copy": "4.3 TB/s", "square GEMM": "790 TFLOP/s"}
BREAK_EVEN = 0.6  # predicted density, runtime.BREAK_EVEN_DENSITY
FLOOR = "three GEMMs, no loss"


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def of_stage(rows: Iterable[Row], stage: str) -> list[Row]:
    return [row for row in rows if row["stage"] == stage and row["name"] not in ("begins", "ends")]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(shown, line)) + " |" for line in lines)


def shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def heading(rows: Sequence[Row]) -> str:
    begins = [row for row in rows if row["name"] == "begins"]
    if not begins:
        return "Nothing was measured."
    first = begins[0]
    versions = [f"{name} {first[name]}" for name in ("torch", "triton", "python") if name in first]
    sizes = first["sizes"]
    return (
        f"{first['date']}, {first['device']}, {', '.join(versions)}; V = {sizes['vocab']}, "
        f"N = {sizes['tokens']}, bfloat16."
    )


def full_passes(rows: Sequence[Row]) -> str:
    """Provider by hidden size: ms, ratio to the three GEMMs, what was predicted, memory."""
    found = of_stage(rows, "ratios")
    split = [(*row["name"].rsplit(", D=", 1), row) for row in found]
    floors = {hidden: row.get("ms") for name, hidden, row in split if name == FLOOR}
    lines = []
    for name, hidden, row in split:
        floor, spent = floors.get(hidden), row.get("ms")
        ratio = spent / floor if spent and floor else None
        predicted = PREDICTED_MS.get(name, {}).get(int(hidden))
        why = row.get("absent") or row.get("error")
        lines.append((name, hidden, spent, ratio, predicted, row.get("extra_mib"), why or ""))
    head = ("provider", "D", "ms", "x three GEMMs", "predicted ms", "extra MiB", "")
    return table(head, lines)


def checks(rows: Sequence[Row], stage: str) -> str:
    """What held, and each that did not."""
    found = of_stage(rows, stage)
    failed = [row for row in found if not row.get("ok")]
    lines = [f"{len(found) - len(failed)} of {len(found)} hold."]
    for row in failed:
        what = {k: v for k, v in row.items() if k not in ("stage", "name", "at", "ok")}
        lines.append(f"* **{row['name']}**: {what}")
    if stage == "correct" and (times := [r["times_plain"] for r in found if "times_plain" in r]):
        lines.append(f"Largest error: {max(times):.2g} times that of plain PyTorch in bfloat16.")
    return "\n".join(lines)


def rates(rows: Sequence[Row]) -> str:
    lines = []
    for row in of_stage(rows, "ceilings"):
        unit = "TB/s" if "tb_per_s" in row else "TFLOP/s"
        value = row.get("tb_per_s", row.get("tflops"))
        what = f"{value:.3g} {unit}" if value else row.get("error")
        lines.append((row["name"], what, PREDICTED.get(row["name"], "")))
    return table(("", "measured", "predicted"), lines)


def sweep(rows: Sequence[Row]) -> str:
    """The five fastest shapes of each dtype."""
    found = [row for row in of_stage(rows, "rows") if "gb_per_s" in row]
    lines = []
    for dtype in ("bfloat16", "float32"):
        best = sorted((r for r in found if r["name"].startswith(dtype)), key=lambda r: r["ms"])[:5]
        lines += [(r["name"], r["ms"], r["gb_per_s"], r["first_sweep_gb_per_s"]) for r in best]
    return table(("row kernel", "ms", "GB/s", "first sweep GB/s"), lines)


def break_even(rows: Sequence[Row]) -> str:
    found = [row for row in of_stage(rows, "tiles") if "dX_to_dense" in row]
    lines = [(r["name"].split()[-1], r["dX_to_dense"], r["dW_to_dense"]) for r in found]
    pays = [
        float(r["name"].split()[-1]) for r in found if r["dX_to_dense"] + r["dW_to_dense"] < 2.0
    ]
    most = f"{max(pays):g}" if pays else "none"
    return (
        table(("density", "dX, x dense", "dW, x dense"), lines)
        + f"\n\nLargest density that pays: {most}; predicted {BREAK_EVEN:g}."
    )


def memory(rows: Sequence[Row]) -> str:
    lines = [
        (
            row["name"],
            row.get("peak_memory_gib"),
            row.get("rehearsed_gib"),
            planned := row.get("planned_gib"),
            planned and row["rehearsed_gib"] and planned / row["rehearsed_gib"],
            row.get("error", ""),
        )
        for row in of_stage(rows, "trainer")
    ]
    head = (
        "0.5 B, three steps",
        "peak GiB",
        "worst step GiB",
        "planned GiB",
        "planned / worst",
        "",
    )
    return table(head, lines)


def failures(rows: Sequence[Row]) -> str:
    lines = [f"* {r['stage']}: {r['name']}: {r['error']}" for r in rows if "error" in r]
    return "\n".join(lines) or "none"


SECTIONS = {
    "Full passes (docs/kernels.md)": full_passes,
    "Correctness (docs/kernels.md)": lambda rows: checks(rows, "correct"),
    "Safety (docs/kernels.md)": lambda rows: checks(rows, "safe"),
    "Memory of the trainer (docs/memory.md)": memory,
    "Ceilings (bench/NOTES.md)": rates,
    "Break-even of the sparse products (bench/NOTES.md)": break_even,
    "Row kernel (bench/NOTES.md)": sweep,
    "Errors": failures,
}


def report(rows: Sequence[Row]) -> str:
    parts = [f"## {title}\n\n{section(rows)}\n" for title, section in SECTIONS.items()]
    return "\n".join([f"{heading(rows)}\n", *parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", type=Path)
    print(report(read(parser.parse_args().results)))


if __name__ == "__main__":
    main()
