"""Is a fresh measurement worse than the committed one?

    python bench/memory.py --out FOLDER/memory.json
    python bench/step.py --out FOLDER
    python bench/loss.py --out FOLDER
    python bench/cpu_memory.py --rounds 1 --out FOLDER
    python bench/regress.py FOLDER [--baseline bench/results/cpu]

Every case of every file in FOLDER whose name is known below is compared with its baseline. Exit 1
where memory has grown by more than 1 % or time by more than 10 %, or where a case of the baseline
is not there any more; 2 where there is nothing to compare. Memory is what the allocator recorded,
which does not depend on the machine's load. Times of another processor, thread count or version say
nothing and are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOLERANCE = {"memory": 0.01, "time": 0.10}
SURROUNDINGS = ("device", "cpu", "cores", "threads", "torch", "python", "transformers")


@dataclass(frozen=True)
class Columns:
    """Of the rows of a result file: what names a case, and which figures must not grow.

    `only`: values that a row of ours has, where the file holds rows of others as well.
    """

    case: tuple[str, ...]
    memory: tuple[str, ...] = ()
    time: tuple[str, ...] = ()
    only: tuple[tuple[str, str], ...] = ()


FILES = {
    "memory.json": Columns(
        case=(
            "model",
            "tokens",
            "weights",
            "compute",
            "checkpointing",
            "lora",
            "tile",
            "gradient_release",
            "optimizer",
        ),
        memory=("resident_mib", "update_mib", "scoring_mib"),
    ),
    "step.json": Columns(
        case=("case",),
        memory=("allocated_mib",),
        time=("step_cpu_seconds",),
        only=(("side", "exgrpo_fast"),),
    ),
    # Memory as the operating system counts it varies by more than the tolerance from run to run.
    "loss.json": Columns(
        case=("case", "provider"),
        time=("time_to_naive",),
        only=(("provider", "linear_policy_loss"),),
    ),
    "cpu_memory.json": Columns(
        case=("work", "keeps", "round"),
        time=("cpu_seconds",),
        only=(("side", "exgrpo_fast"),),
    ),
}


@dataclass(frozen=True)
class Finding:
    """One figure of one case; `after` None: the case is missing."""

    case: str
    figure: str
    kind: str
    before: float
    after: float | None

    @property
    def growth(self) -> float | None:
        return None if self.after is None else self.after / self.before - 1.0

    @property
    def is_worse(self) -> bool:
        return self.growth is None or self.growth > TOLERANCE[self.kind]

    def line(self) -> str:
        told = "missing" if self.growth is None else f"{self.growth:+8.1%}"
        after = "-" if self.after is None else f"{self.after:.3f}"
        mark = "WORSE" if self.is_worse else ""
        return f"{self.case:58} {self.figure:18} {self.before:12.3f} {after:>12} {told:>8} {mark}"


def compare(columns: Columns, before: dict[str, Any], after: dict[str, Any]) -> Iterator[Finding]:
    """A finding for each figure of each case of the baseline."""
    kinds = {"memory": columns.memory}
    if same_surroundings(before, after):
        kinds["time"] = columns.time
    fresh = by_case(columns, after)
    for case, row in by_case(columns, before).items():
        for kind, figures in kinds.items():
            for figure in figures:
                found = fresh[case][figure] if case in fresh else None
                yield Finding(case, figure, kind, row[figure], found)


def by_case(columns: Columns, results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    ours = [r for r in results["rows"] if all(r[name] == value for name, value in columns.only)]
    cases = {" ".join(str(row[name]) for name in columns.case): row for row in ours}
    assert len(cases) == len(ours), f"{columns.case} do not tell all cases apart"
    return cases


def same_surroundings(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return all(before.get(name) == after.get(name) for name in SURROUNDINGS)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fresh", type=Path, help="folder with the new result files")
    parser.add_argument("--baseline", type=Path, default=Path("bench/results/cpu"))
    arguments = parser.parse_args()
    findings: list[Finding] = []
    for name, columns in FILES.items():
        files = [folder / name for folder in (arguments.baseline, arguments.fresh)]
        if not all(file.exists() for file in files):
            print(f"{name}: not in both folders")
            continue
        before, after = (json.loads(file.read_text()) for file in files)
        if columns.time and not same_surroundings(before, after):
            print(f"{name}: times are not compared, another machine or other versions")
        findings += compare(columns, before, after)
    for finding in findings:
        print(finding.line())
    if not findings:
        return 2
    worse = sum(finding.is_worse for finding in findings)
    print(f"{worse} of {len(findings)} figures are worse")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
