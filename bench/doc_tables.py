"""The tables of the docs, made from bench/results/, and the command that measures each anew.

    python bench/doc_tables.py                what there is
    python bench/doc_tables.py replay_study   one table, as it stands in its page

`tests/test_doc_tables.py` compares every row with the page.
"""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

BENCH = Path(__file__).parent
UNWRAPPED = 10_000  # columns of a pipe or a file
Results = Mapping[str, Any]
Rows = list[list[str]]


class Table(NamedTuple):
    """`rows`: results of `file` -> the rows of the table in `page`, its header first."""

    file: str  # under bench/results/
    page: str  # under the repository's root
    rows: Callable[[Results], Rows]


# --- numbers as the pages write them --------------------------------------------------------------


def signed(value: float, form: str = ".1f") -> str:
    return f"{value:+{form}}".replace("-", "−")


def scientific(value: float, digits: int = 1) -> str:
    """1.5e-4"""
    return f"{value:.{digits}e}".replace("e-0", "e-")


def spanned(found: Results, *, sign: bool = False, percent: str = "") -> str:
    """'82.7 [75.4, 90.0]' in percent, of a mean with its interval."""
    mean, low, high = (100 * found[name] for name in ("mean", "low", "high"))
    if sign:
        return f"{signed(mean)} [{low:.1f}, {high:.1f}]".replace("-", "−")
    return f"{mean:.1f}{percent} [{low:.1f}, {high:.1f}]"


# --- tables ---------------------------------------------------------------------------------------


def replay_study(results: Results) -> Rows:
    rows = [["", "avg@8", "minus on-policy", "entropy at the end", "pass@8"]]
    for arm, row in results["table"].items():
        is_base = arm == "on-policy"
        rows.append(
            [
                "on-policy Dr.GRPO" if is_base else arm,
                spanned(row["avg_at_8"]),
                "" if is_base else spanned(row["minus_on_policy"], sign=True),
                f"{row['entropy']:.3f}",
                f"{100 * row['pass_at_8']:.1f}",
            ]
        )
    return rows


def when_experience_pays(results: Results) -> Rows:
    header = ["start", "method", "seeds", "end", "minus on-policy"]
    header += ["at equal tokens", "pass@8", "entropy"]
    return [header] + [
        [
            f"{100 * row['start']:.1f} %",
            row["arm"],
            str(row["seeds"]),
            f"{100 * row['end']['mean']:.1f} %",
            difference(row, "minus_on_policy"),
            difference(row, "minus_on_policy_at_equal_tokens"),
            f"{100 * row['pass_at_8']:.1f} %",
            f"{row['entropy']:.3f}",
        ]
        for row in results["table"]
        if not row["is_choice"]
    ]


def choices_of_exgrpo(results: Results) -> Rows:
    """Each choice of ExGRPO changed, minus ExGRPO as published; in the last column both from step 1.
    A cell with fewer seeds than the study has says so."""
    rates = sorted({rate for row in results["choices"] for rate in row["minus_exgrpo"]}, key=float)
    header = ["examined", "changed", *(f"from {100 * float(rate):.0f} %" for rate in rates)]

    def cell(found: Results | None) -> str:
        if not found:
            return ""
        few = f" ({len(found['values'])} seeds)" if len(found["values"]) < 5 else ""
        return spanned(found, sign=True) + few

    rows = [[*header, f"from {100 * results['corner']:.0f} %, replay from step 1"]]
    for row in results["choices"]:
        gaps = [cell(row["minus_exgrpo"].get(rate)) for rate in rates]
        changed = row["arm"].removeprefix("ExGRPO").removeprefix(",").strip()
        rows.append([row["examined"], changed, *gaps, cell(row["from_step_1"])])
    return rows


def difference(row: Results, name: str) -> str:
    """'' for the baseline; without an interval where there is one seed."""
    if row["arm"] == "on-policy":
        return ""
    found = row[name]
    if found["low"] is None:
        return signed(100 * found["mean"])
    return spanned(found, sign=True)


def eapo_study(results: Results) -> Rows:
    def share(found: Results) -> str:
        mean, low, high = (100 * found[name] for name in ("mean", "low", "high"))
        return f"{mean:.0f} %" if low == high else f"{mean:.0f} % [{low:.0f}, {high:.0f}]"

    header = ["", f"held-out avg@4 after {results['steps']} steps"]
    header += [f"steps to DAPO's final accuracy, of DAPO's {results['steps']}"]
    rows = [[*header, "steps to half of it, of DAPO's"]]
    for arm in ("on-policy DAPO", "EAPO"):
        row = results["table"][arm]
        mean, low, high = (100 * row["minus_dapo"][name] for name in ("mean", "low", "high"))
        paired = f", paired {mean:+.1f} [{low:+.1f}, {high:+.1f}]" if mean else ""
        shares = share(row["share_of_steps"]), share(row["share_of_steps_to_half"])
        rows.append([arm, spanned(row["after"], percent=" %") + paired, *shares])
    return rows


def step(results: Results) -> Rows:
    names = {
        "large-64": "32,768, 64",
        "large-varied": "32,768, 64 on average, at most 256",
        "small-varied": "512, 64 on average, at most 256",
        "small-64": "512, 64",
    }
    rows = [
        [
            "vocabulary, completion tokens",
            "steps a second",
            "by CPU-seconds",
            "resident memory",
            "allocated",
        ]
    ]
    for case, name in names.items():
        ratio = results["ratios"][case]
        rows.append(
            [name]
            + [f"{ratio[key]:.1f} x" for key in ("speed", "speed_by_cpu_seconds")]
            + [f"{ratio[key]:.2f} x" for key in ("resident", "allocated")]
        )
    return rows


def growth(results: Results) -> Rows:
    rows = [["what grows", "from", "to", "CPU seconds", "exponent"]]
    for row in results["rows"]:
        sizes, seconds = row["sizes"], row["cpu_seconds"]
        spent = f"{seconds[0]:.3f} to {seconds[-1]:.3f}"
        rows.append(
            [row["grows"], f"{sizes[0]:,}", f"{sizes[-1]:,}", spent, f"{row['exponent']:.2f}"]
        )
    return rows


def packing(results: Results) -> Rows:
    header = ["prompt", "longest completion", "tokens read, to each alone"]
    header += ["time of an update, to each alone"]
    return [header] + [
        [
            str(row["prompt_tokens"]),
            str(row["longest_response"]),
            f"{row['tokens_ratio']:.2f}",
            f"{row['seconds_ratio']:.2f}",
        ]
        for row in results["rows"]
    ]


def cpu_memory(results: Results) -> Rows:
    names = {
        "rollout": "rollout by the trainer",
        "generate": "`generate` of transformers",
        "update": "forward and backward of the loss",
    }
    rows = [["", "CPU seconds, default and kept", "page faults, default and kept"]]
    for work, name in names.items():
        default, kept = (
            next(r for r in results["rows"] if r["work"] == work and r["keeps"] is keeps)
            for keeps in (False, True)
        )
        rows.append(
            [
                name,
                f"{default['cpu_seconds']:.2f} and {kept['cpu_seconds']:.2f}",
                f"{default['page_faults']:,} and {kept['page_faults']:,}",
            ]
        )
    return rows


def policy_sparsity(results: Results) -> Rows:
    header = [
        "after step",
        "entropy",
        "θ",
        "density",
        "mass skipped",
        "error of dX",
        "with centroids",
    ]
    rows = [[*header, "error of dW"]]
    points = {(p["step"], p["threshold"], p["tail"]): p for p in results["points"]}
    for (step, threshold, tail), row in points.items():
        if tail != "drop" or threshold > 1e-3:
            continue
        rows.append(
            [
                str(step),
                f"{row['entropy']:.2f}",
                scientific(threshold, 0),
                f"{row['density']:.2f}",
                f"{100 * row['skipped_mass']:.2g} %",
                scientific(row["dx"]),
                scientific(points[step, threshold, "centroid"]["dx"]),
                scientific(row["dw"]),
            ]
        )
    return rows


def mismatch(results: Results) -> Rows:
    shares = ["sample share, tokens", "sequences"]
    rows = [["engine", "dtype", "tokens", "mean \\|d\\|", "largest", *shares]]
    for row in results["rows"]:
        rows.append(
            [
                row["engine"],
                row["dtype"],
                f"{row['tokens']:,}",
                scientific(row["mean"]),
                scientific(row["max"]),
                f"{100 * row['token_share']:.1f} %",
                f"{100 * row['sequence_share']:.1f} %",
            ]
        )
    return rows


def smollm2_study(results: Results) -> Rows:
    rows = [["", "held out, by seed", "mean", "minus on-policy", "tokens generated", "trained"]]
    for arm, row in results["table"].items():
        is_base = arm == "on-policy"
        rows.append(
            [
                arm,
                ", ".join(f"{100 * value:.1f}" for value in row["after"]["values"]),
                spanned(row["after"]),
                "" if is_base else spanned(row["minus_on_policy"], sign=True),
                f"{row['tokens_generated']:,.0f}",
                f"{row['tokens_trained']:,.0f}",
            ]
        )
    return rows


def what_fits(results: Results) -> Rows:
    cards = [key for key in results["rows"][0] if key != "kind"]
    rows = [["trained", *cards]]
    return rows + [[row["kind"], *(row[card] or "–" for card in cards)] for row in results["rows"]]


def adapters(results: Results) -> Rows:
    header = ["", "time, TRL = 1", "processor time, TRL = 1", "peak memory"]
    rows = [[*header, "error of the head's gradient"]]
    for row in results["rows"]:
        if "absent" in row:
            rows.append([row["side"], f"not run: {row['absent']}", "", "", ""])
            continue
        ratios = (f"{row[key]:.2f}" for key in ("times_trl", "cpu_times_trl"))
        memory, error = f"{row['peak_mib']:,.0f} MiB", f"{row['gradient_error']:.0e}"
        rows.append([row["side"], *ratios, memory, error])
    return rows


def scale_model(results: Results) -> Rows:
    header = ["model", "GPUs", "train + servers", "pack", "GiB", "GB a step", "compute"]
    rows = [[*header, "network", "generate", "step"]]
    for row in results["rows"]:
        first = [row["model"], str(row["gpus"])]
        if not row["fits"]:
            rows.append([*first, "does not fit", *[""] * 7])
            continue
        servers = f"{row['servers']} x {row['server_gpus']}" if row["servers"] else "the same"
        seconds = [f"{row[key]:.1f} s" for key in ("compute_seconds", "network_seconds")]
        rows.append(
            [
                *first,
                f"{row['training_gpus']} + {servers}",
                f"{row['pack_tokens']:,}",
                f"{row['memory_gib']:.0f}",
                f"{row['network_gb']:,.0f}",
                *seconds,
                f"{row['generation_seconds']:.1f} s",
                f"{row['overlapped_seconds']:.0f} to {row['in_turn_seconds']:.0f} s",
            ]
        )
    return rows


TABLES = [
    Table("scale_model.json", "docs/scale.md", scale_model),
    Table("what_fits.json", "README.md", what_fits),
    Table("cpu/adapters.json", "docs/adapters.md", adapters),
    Table("cpu/replay_study.json", "docs/exgrpo.md", replay_study),
    Table("cpu/eapo_study.json", "docs/eapo.md", eapo_study),
    Table("cpu/when_experience_pays.json", "docs/when-to-use-what.md", when_experience_pays),
    Table("cpu/when_experience_pays.json", "docs/when-to-use-what.md", choices_of_exgrpo),
    Table("cpu/step.json", "docs/memory.md", step),
    Table("cpu/packing.json", "docs/memory.md", packing),
    Table("cpu/growth.json", "docs/scale.md", growth),
    Table("cpu/cpu_memory.json", "docs/smollm2.md", cpu_memory),
    Table("cpu/smollm2_study.json", "docs/smollm2.md", smollm2_study),
    Table("cpu/mismatch.json", "docs/rollouts.md", mismatch),
    Table("cpu/policy_sparsity-smollm2.json", "docs/kernels.md", policy_sparsity),
]
# Every file of bench/results/ and what writes it anew.
COMMANDS = {
    "scale_model.json": "python bench/scale_model.py",
    "memory_goals.json": "python bench/memory_goals.py",
    "what_fits.json": "python bench/what_fits.py",
    "aot/triton-3.6.0.json": "python bench/aot.py",
    "aot/triton-3.7.1.json": "python bench/aot.py",
    "cpu/adapters.json": ".venv-adapters/bin/python bench/adapters.py",
    "cpu/chaos.json": "make chaos; .venv-vllm/bin/python tests/chaos/suite.py --vllm",
    "cpu/checkpoint.json": "python bench/checkpoint.py",
    "cpu/cpu_memory.json": "python bench/cpu_memory.py",
    "cpu/density.json": "python bench/density.py RUN",
    "cpu/drift.json": "python bench/drift.py",
    "cpu/eapo.json": "python bench/eapo.py",
    "cpu/eapo_study.json": "python bench/study_eapo.py",
    "cpu/experience.json": "python bench/experience.py",
    "cpu/growth.json": "python bench/growth.py",
    "cpu/herl_quickstart.json": "exgrpo-fast train quickstart-herl",
    "cpu/loss.json": "python bench/loss.py",
    "cpu/memory.json": "python bench/memory.py",
    "cpu/memory_sharded.json": "python bench/memory_sharded.py",
    "cpu/mismatch.json": "python bench/mismatch.py",
    "cpu/packing.json": "python bench/packing.py",
    "cpu/policy_sparsity.json": "python bench/policy_sparsity.py RUN",
    "cpu/policy_sparsity-smollm2.json": "python bench/policy_sparsity.py RUN --questions 16 "
    "--name policy_sparsity-smollm2",
    "cpu/replay_study.json": "python bench/study_replay.py",
    "cpu/rewards.json": "python bench/rewards.py",
    "cpu/rollout-512.json": "python bench/rollout.py --layers 8 --width 512 --name rollout-512",
    "cpu/rollout-smollm2.json": "python bench/rollout.py --model FOLDER --dtype float32 "
    "--prompt-tokens 36 --tokens 64 --repeats 3 --servers --steps 0 --name rollout-smollm2",
    "cpu/rollout-smollm2-loop.json": "python bench/rollout.py --model FOLDER --dtype float32 "
    "--prompt-tokens 36 --tokens 64 --repeats 3 --engines transformers --own-loop --servers --steps 0 "
    "--name rollout-smollm2-loop",
    "cpu/rollout-smollm2-sums.json": "python bench/rollout.py --model FOLDER --dtype float32 --sums "
    "--tokens 32 --repeats 3 --engines transformers --own-loop --servers --steps 0 "
    "--name rollout-smollm2-sums",
    "cpu/rollout-smollm2-bf16.json": "python bench/rollout.py --model FOLDER --dtype bfloat16 "
    "--prompt-tokens 36 --tokens 64 --repeats 3 --engines transformers --own-loop --servers --steps 0 "
    "--name rollout-smollm2-bf16",
    "cpu/rollout.json": "python bench/rollout.py",
    "cpu/smollm2.json": "exgrpo-fast train smollm2",
    "cpu/smollm2_gsm8k.json": "exgrpo-fast eval --model smollm2 --data FILE --reward last_number -n 4 "
    "--max-completion-tokens 256",
    "cpu/smollm2_study.json": "python bench/study_smollm2.py",
    "cpu/sparse_training.json": "exgrpo-fast train quickstart --train.sparsity 1e-4",
    "cpu/sparsity.json": "python bench/sparsity.py",
    "cpu/step.json": "python bench/step.py",
    "cpu/step-smollm2.json": "python bench/step.py --cases smollm2 --repeats 1 --steps 1 --out DIR",
    "cpu/when_experience_pays.json": "python bench/study_when.py",
}


def load(name: str) -> Results:
    return json.loads((BENCH / "results" / name).read_text())


def markdown(rows: Rows) -> str:
    lines = ["|".join(["", *(f" {cell} " if cell else " " for cell in row), ""]) for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def overview(width: int) -> str:
    """Two lines for each file: its name, its date and its page, then what writes it anew."""
    lines = []
    for name, command in COMMANDS.items():
        page = next((table.page for table in TABLES if table.file == name), "")
        lines.append(f"{Path(name).stem:23} {load(name).get('date', ''):10} {page}".rstrip())
        lines.append(shell_lines(command, width, indent="    "))
    return "\n".join(lines)


def shell_lines(command: str, width: int, *, indent: str) -> str:
    """The command in lines of at most `width` columns, joined as a shell reads them."""
    room = width - len(indent) - len("  ") - len(" \\")  # of the second line
    lines = textwrap.wrap(command, room, break_long_words=False, break_on_hyphens=False)
    return indent + f" \\\n{indent}  ".join(lines)


def show(rows: Rows, width: int) -> None:
    """Markdown for a pipe or a file; on a terminal columns that fit into it."""
    if width == UNWRAPPED:
        print(markdown(rows))
        return
    from rich.console import Console  # a pipe needs no rich
    from rich.table import Table as Columns

    columns = Columns(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for title in rows[0]:
        columns.add_column(title, overflow="fold")
    for row in rows[1:]:
        columns.add_row(*row)
    Console(width=width, highlight=False, markup=False).print(columns)


def main(words: list[str]) -> int:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else UNWRAPPED
    if not words:
        print(overview(width))
        return 0
    by_stem = {Path(name).stem: name for name in COMMANDS}
    for word in words:
        if word not in by_stem:
            print(f"results: there is no '{word}'; there are {', '.join(by_stem)}", file=sys.stderr)
            return 2
        name = by_stem[word]
        results = load(name)
        print(f"bench/results/{name}, {results.get('date', 'no date')}")
        print(f"again: {shell_lines(COMMANDS[name], width - 7, indent='')}")
        tables = [table for table in TABLES if table.file == name]
        for table in tables:
            print(f"{table.page}\n")
            show(table.rows(results), width)
            print()
        if not tables:
            print("no table of the docs: its numbers are in the text\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
