"""make chaos: everything is done to tiny runs that a machine, a disk or a person may do to a run.

    python tests/chaos/suite.py [--short] [--seed N] [--out FILE]
    python tests/chaos/suite.py --vllm    two servers of vLLM, in an environment that has it
    python tests/chaos/suite.py --markdown    the table of docs/reliability.md, from FILE

Prints a table (number in the catalogue of docs/reliability.md, what, figure, goal) and writes the
figures as JSON. The exit code is 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), str(Path(__file__).parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:3])

import rollout_servers  # noqa: E402
import scenarios  # noqa: E402
from lives import World  # noqa: E402

from exgrpo_fast.build.environment import package_versions  # noqa: E402

Figures = dict[str, Any]
VLLM_STEPS = 120


@dataclass(frozen=True)
class Entry:
    number: str
    what: str
    figure: str
    goal: str
    reached: bool | None  # None: could not be tried here
    timed: bool = False  # a busy machine can miss it


def of_kills(f: Figures) -> list[Entry]:
    clean = not (f["failed_resumes_or_broken_checkpoints"] or f["lost_committed_checkpoints"])
    clean = clean and not (f["leftover_temporary_files"] or f["orphans"] or f["tracebacks"])
    share = f["inside_a_save"] / max(f["kills"], 1)
    return [
        Entry(
            "F1",
            f"kill -9, {f['kills']} times, {share:.0%} inside a save",
            f"{f['failed_resumes_or_broken_checkpoints']} failed, "
            f"{f['lost_committed_checkpoints']} checkpoints lost, "
            f"{f['leftover_temporary_files']} files and {f['orphans']} processes left",
            "0, 0, 0, 0",
            clean,
        ),
        Entry(
            "F1",
            f"the curve of {f['steps']} steps against an unbroken run",
            f"{f['losses_that_differ']} losses differ, final state "
            f"{'equal' if f['final_state_equal'] else 'DIFFERS'}",
            "0, equal",
            f["losses_that_differ"] == 0 and f["final_state_equal"],
        ),
    ]


def of_leaks(f: Figures) -> list[Entry]:
    low, high = f["descriptors"]
    return [
        Entry(
            "F27",
            f"memory and descriptors over {f['steps']} steps",
            f"{f['mib_per_100_steps']} MiB per 100 steps, {low} to {high} descriptors",
            "<= 1 MiB, constant",
            f["exit"] == 0 and f["mib_per_100_steps"] <= 1.0 and high - low <= 3,
        )
    ]


def of_resumes(f: Figures) -> list[Entry]:
    figure = f"{f['bitwise_equal']}/{f['points']} bitwise"
    return [Entry("F5", "resume at each step", figure, "all", f["bitwise_equal"] == f["points"])]


def of_corruptions(f: Figures) -> list[Entry]:
    right, tried = f["walked_back"].split("/")
    return [
        Entry(
            "F4",
            "damage to one file of a checkpoint",
            f"{f['named']}/{f['damages']} named, {f['walked_back']} walked back",
            "all, all",
            f["named"] == f["damages"] and right == tried,
        )
    ]


def of_disks(f: Figures) -> list[Entry]:
    if "skipped" in f:
        return [Entry("F3", "full disks", f["skipped"], "", None)]
    small, awhile, good = f["small"], f["for_a_while"], f["for_good"]
    whole = not any(part["truncated_checkpoints"] + part["tracebacks"] for part in (small, awhile))
    return [
        Entry(
            "F3",
            "a disk of 2.5 checkpoints",
            f"exit {small['exit']}, {small['save_failures']} failed saves",
            "exit 0",
            small["exit"] == 0 and small["newest_checkpoint"] == 40 and whole,
        ),
        Entry(
            "F3",
            "a disk full for a while",
            f"exit {awhile['exit']}, {awhile['save_failures']} failed saves, newest checkpoint "
            f"{awhile['newest_checkpoint']} of 40",
            "exit 0, >= 1 failed save",
            awhile["exit"] == 0 and awhile["save_failures"] >= 1 and whole,
        ),
        Entry(
            "F3",
            "a disk full for good",
            f"exit {good['exit']}, last good checkpoint {good['newest_checkpoint']}, "
            f"{good['truncated_checkpoints']} truncated",
            "exit 74, one kept, 0",
            good["exit"] == 74
            and good["newest_checkpoint"] is not None
            and not good["truncated_checkpoints"] + good["tracebacks"],
        ),
    ]


def of_signals(f: Figures) -> list[Entry]:
    clean = f["right"] == f["signals"] and not f["orphans"] + f["tracebacks"]
    slowest = f["seconds_max"]
    return [
        Entry("F22", "SIGTERM and SIGINT", f"{f['right']}/{f['signals']} correct", "all", clean),
        Entry("F22", "from signal to end", f"{slowest} s", "<= 5 s", slowest <= 5.0, timed=True),
    ]


def of_doubles(f: Figures) -> list[Entry]:
    figure = f"{f['exactly_one_survivor']}/{f['starts']}, first named {f['first_named']} times"
    right = f["exactly_one_survivor"] == f["starts"] == f["first_named"]
    return [Entry("F24", "two starts at once", figure, "one survivor, named", right)]


def of_refusal(f: Figures) -> list[Entry]:
    figure = f"exit {f['exit']} after {f['seconds']} s"
    right = f["exit"] == 2 and f["seconds"] < 2.0
    return [
        Entry("F24", "a second start, from a shell", figure, "exit 2, < 2 s", right, timed=True)
    ]


def of_supervised(f: Figures) -> list[Entry]:
    return [
        Entry(
            "F13 F28",
            "worker killed, then stopped, under its supervisor",
            f"exit {f['exit']}, {f['restarts']} restarts, silence noticed after "
            f"{f['noticed_seconds']} s of {f['deadline_seconds']}, "
            f"{f['losses_that_differ']} of {f['steps']} losses differ",
            "exit 0, deadline + 5 s, 0",
            f["exit"] == 0
            and f["noticed_seconds"] <= f["deadline_seconds"] + 5
            and f["losses_that_differ"] == f["orphans"] == 0,
        )
    ]


def of_numbers(f: Figures) -> list[Entry]:
    nan, rate, hostile = f["nan_in_a_weight"], f["rate_1e20"], f["hostile_reward"]
    constant = [f["reward_always"], f["reward_never"]]
    return [
        Entry(
            "F6",
            "NaN in one weight of a checkpoint",
            f"exit {nan['exit']}, {nan['newer_checkpoints']} checkpoints written after it",
            "exit 70, 0",
            nan == {"exit": 70, "newer_checkpoints": 0},
        ),
        Entry(
            "F6",
            "learning rate 1e20",
            f"exit {rate['exit']}, {rate['checkpoints_with_nan']} checkpoints with NaN",
            "exit 70, 0",
            rate == {"exit": 70, "checkpoints_with_nan": 0, "tracebacks": 0},
        ),
        Entry(
            "F7",
            "all correct, all wrong, 20 steps each",
            f"exit {[c['exit'] for c in constant]}, weights bit-identical "
            f"{[c['weights_bit_identical'] for c in constant]}",
            "exit 0, bit-identical",
            all(c["exit"] == 0 and c["weights_bit_identical"] for c in constant),
        ),
        Entry(
            "F14",
            "a reward that raises, sleeps, eats memory, exits, kills, returns NaN",
            f"exit {hostile['exit']}, {hostile['steps']} steps, {hostile['orphans']} orphans",
            "exit 0, all steps, 0",
            hostile["exit"] == 0 and hostile["steps"] == 5 and not hostile["orphans"],
        ),
    ]


def of_folders(f: Figures) -> list[Entry]:
    right = f["exit"] == 0 and f["newest"] == 40 and not f["gaps_after_the_removal"]
    return [
        Entry(
            "F23",
            "run.log, metrics and tables removed under a run",
            f"exit {f['exit']}, {'gaps' if f['gaps_after_the_removal'] else 'no gap'} afterwards",
            "exit 0, no gap",
            right and not f["tracebacks"],
        )
    ]


def of_servers(f: Figures) -> list[Entry]:
    nothing_lost = not f["steps_whose_questions_differ"] + f["steps_whose_tokens_differ"]
    same = not f["losses_that_differ"] and f["final_state_equal"]
    when = "20 s after both serve" if f["engine"] == "vLLM" else "every 20 s"
    return [
        Entry(
            "F29",
            f"one of two rollout servers ({f['engine']}) killed {when}, {f['kills']} times",
            f"exit {f['exit']}, {f['steps']} steps, {f['requests_resent']} requests asked again, "
            f"{f['losses_that_differ']} losses differ, questions and tokens "
            f"{'equal' if nothing_lost else 'DIFFER'}, final state "
            f"{'equal' if f['final_state_equal'] else 'DIFFERS'}",
            "exit 0, 0, equal, equal",
            f["exit"] == f["exit_undisturbed"] == f["tracebacks"] == f["staleness_max"] == 0
            and f["kills"] >= 3
            and f["requests_resent"] > 0
            and nothing_lost
            and same,
        )
    ]


def of_offline(f: Figures) -> list[Entry]:
    if "skipped" in f:
        return [Entry("F26", "no network", f["skipped"], "", None)]
    figure = f"exit {f['exit']}, {f['steps']} steps"
    return [
        Entry("F26", "no network at all", figure, "exit 0, 3 steps", f == {"exit": 0, "steps": 3})
    ]


Scenario = tuple[str, Callable[[World], Figures], Callable[[Figures], list[Entry]]]


def plan(short: bool, vllm: bool, rng: random.Random) -> list[Scenario]:
    if vllm:
        real = lambda w: rollout_servers.servers(w, VLLM_STEPS, is_real=True)  # noqa: E731
        return [("vllm_servers", real, of_servers)]
    n = (lambda few, many: few) if short else (lambda few, many: many)
    chosen: list[Scenario] = [
        ("kills", lambda w: scenarios.kills(w, n(4, 200), rng), of_kills),
        ("resumes", lambda w: scenarios.resumes(w, n(2, 20)), of_resumes),
        ("corruptions", lambda w: scenarios.corruptions(w, n(10, 300), rng), of_corruptions),
        ("signals", lambda w: scenarios.signals(w, n(2, 50), rng), of_signals),
        ("doubles", lambda w: scenarios.doubles(w, n(2, 50)), of_doubles),
        ("disks", scenarios.disks, of_disks),
        ("folders", scenarios.folders, of_folders),
        ("numbers", scenarios.numbers, of_numbers),
        ("offline", scenarios.offline, of_offline),
    ]
    if not short:
        chosen.append(("servers", lambda w: rollout_servers.servers(w, 20), of_servers))
        chosen.append(("refusal", scenarios.refusal_seconds, of_refusal))
        chosen.append(("supervised", scenarios.supervised, of_supervised))
        chosen.append(("leaks", lambda w: scenarios.leaks(w, 1000), of_leaks))
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a minute instead of many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="these scenarios; in --out the others stay as they are")
    parser.add_argument(
        "--vllm", action="store_true", help="two servers of vLLM alone; the others stay as they are"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/cpu/chaos.json")
    parser.add_argument("--markdown", action="store_true", help="run nothing, print the table")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown(json.loads(arguments.out.read_text())))
        return 0
    rng = random.Random(arguments.seed)
    found: dict[str, Figures] = {}
    if arguments.only or arguments.vllm:
        found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    with tempfile.TemporaryDirectory(prefix="exgrpo-chaos-") as folder:
        world = World(Path(folder))
        for name, scenario, read in plan(arguments.short, arguments.vllm, rng):
            if arguments.only and name not in arguments.only.split(","):
                continue
            start = time.monotonic()
            figures = scenario(world)
            entries = read(figures)
            print(*map(line_of, entries), sep="\n", flush=True)
            found[name] = surroundings() | {
                "seed": arguments.seed,
                "seconds": round(time.monotonic() - start),
                "table": [entry.__dict__ for entry in entries],
                "figures": figures,
            }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    reached = [entry["reached"] for part in found.values() for entry in part["table"]]
    print(f"{len(reached)} entries, {reached.count(False)} missed; {arguments.out}")
    return 1 if False in reached else 0


def surroundings() -> Figures:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": f"CPU, {os.cpu_count()} cores, {platform.machine()}",
        "versions": package_versions(),
    }


def line_of(entry: Entry) -> str:
    word = {True: "ok", False: "MISSED", None: "not tried"}[entry.reached]
    return f"{entry.number:8} {word:9} {entry.what}: {entry.figure} (goal {entry.goal})"


def markdown(found: Figures) -> str:
    rows = [entry for part in found.values() for entry in part["table"]]
    rows.sort(key=lambda entry: int(entry["number"].split()[0].removeprefix("F")))
    lines = ["| | what is done | figure | goal |", "|---|---|---|---|"]
    for entry in rows:
        missed = " **missed**" if entry["reached"] is False else ""
        lines.append(
            f"| {entry['number']} | {entry['what']} | {entry['figure']}{missed} | {entry['goal']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
