"""What the runs of study_when.py say: the table, the choices of ExGRPO one by one, and the figure."""

from __future__ import annotations

import itertools
import operator
import statistics
from collections.abc import Callable
from pathlib import Path

from figures import panels
from study import bounds, interval
from study_when_arms import (
    AGAIN,
    BASELINE,
    CHOICE_RATES,
    CHOICES,
    CORNER,
    EVERY_ARM,
    LOSING,
    LOSING_CHOICES,
    RATES,
    WEIGHTS_AND_DUPLICATES,
    from_step_1,
)

COLLAPSE = 0.10  # a run whose end lies so far below the best point of its curve
# Which changed runs show what a choice of ExGRPO makes.
EXAMINED: dict[str, tuple[str, ...]] = {
    "start rule": ("ExGRPO from step 1",),
    "bucket width": ("ExGRPO, sigma 1 (as printed)",),
    "retirement": ("ExGRPO without retirement",),
    "shaping factor": ("ExGRPO, shaping 0.02", "ExGRPO, shaping 1", "ExGRPO without shaping"),
    "duplicates": ("ExGRPO, duplicates stored", "ExGRPO, one stored a question"),
    "staleness": ("ExGRPO, at most 10 steps old",),
    "choice of trajectory": ("ExGRPO, highest entropy",),
}


def key_of(run: dict) -> tuple[float, str, int]:
    return run["rate"], run["arm"], run["seed"]


def compute(point: dict[str, float]) -> float:
    """Tokens generated and tokens trained."""
    return point["tokens_generated"] + point["tokens_trained"]


def held_out_at(run: dict, tokens: float) -> float:
    """Held-out accuracy at a number of tokens, on straight lines between evaluations; EAPO's curve
    begins where its prior is paid for, and lies at its start before that."""
    points = run["curve"]
    if tokens <= compute(points[0]):
        return points[0]["held_out"]
    for before, after in itertools.pairwise(points):
        if tokens <= compute(after):
            share = (tokens - compute(before)) / (compute(after) - compute(before))
            return before["held_out"] + share * (after["held_out"] - before["held_out"])
    return points[-1]["held_out"]


def reached(run: dict, target: float, cost: Callable[[dict], float]) -> float | None:
    """What it cost until the curve crosses a held-out accuracy; None where it never does."""
    for before, after in itertools.pairwise(run["curve"]):
        if after["held_out"] >= target > before["held_out"]:
            share = (target - before["held_out"]) / (after["held_out"] - before["held_out"])
            return cost(before) + share * (cost(after) - cost(before))
    return None


def tokens_to_match(run: dict, base: dict) -> float | None:
    """Tokens to get nine tenths of what the baseline gains, as a share of the baseline's own."""
    best = max(point["held_out"] for point in base["curve"])
    target = base["start"] + 0.9 * (best - base["start"])
    own, theirs = reached(run, target, compute), reached(base, target, compute)
    return own / theirs if own and theirs else None


def is_collapsed(run: dict) -> bool:
    return run["end"] < max(point["held_out"] for point in run["curve"]) - COLLAPSE


def table_of(runs: list[dict]) -> list[dict]:
    """One row a cell, over the seeds that it has; differences are paired by seed."""
    completions = operator.itemgetter("completions")
    rows = []
    for rate, arm in itertools.product(RATES, EVERY_ARM):
        mine = [run for run in runs if key_of(run)[:2] == (rate, arm)]
        paired = pairs_of(runs, rate, arm, BASELINE)
        if not paired:
            continue
        at_equal_tokens = []
        for run, base in paired:
            tokens = min(compute(run["curve"][-1]), compute(base["curve"][-1]))
            at_equal_tokens.append(held_out_at(run, tokens) - held_out_at(base, tokens))
        halfway = [reached(run, (1 + run["start"]) / 2, completions) for run in mine]
        found = [cost for cost in halfway if cost is not None]
        matched = [cost for pair in paired if (cost := tokens_to_match(*pair)) is not None]
        rows.append(
            {
                "rate": rate,
                "arm": arm,
                "is_choice": arm in CHOICES | WEIGHTS_AND_DUPLICATES | LOSING_CHOICES | AGAIN,
                "seeds": len(mine),
                "start": statistics.fmean(run["start"] for run in mine),
                "without_gradient": statistics.fmean(run["without_gradient"] for run in mine),
                "end": interval([run["end"] for run in mine]),
                "minus_on_policy": interval([run["end"] - base["end"] for run, base in paired]),
                "minus_on_policy_at_equal_tokens": interval(at_equal_tokens),
                "tokens": statistics.fmean(compute(run["curve"][-1]) for run in mine),
                "cpu_seconds": statistics.fmean(r["curve"][-1]["cpu_seconds"] for r in mine),
                "completions_to_halfway": statistics.median(found) if found else None,
                "reached_halfway": len(found),
                "tokens_to_match": statistics.median(matched) if matched else None,
                "matched": len(matched),
                "pass_at_8": statistics.fmean(run["pass_at_8"] for run in mine),
                "entropy": statistics.fmean(run["entropy"] for run in mine),
                "collapsed": sum(map(is_collapsed, mine)),
            }
        )
    return rows


def choice_rows(runs: list[dict]) -> list[dict]:
    """What each choice of ExGRPO makes: the run with it changed minus ExGRPO, paired by seed where
    both began with the same weights, and in the corner with runs of the same version."""
    rows = []
    for examined, arms in EXAMINED.items():
        for arm in arms:
            later = arm in CHOICES | WEIGHTS_AND_DUPLICATES
            found = {
                str(rate): gap(
                    runs, rate, arm, "ExGRPO again" if later and rate == CORNER else "ExGRPO"
                )
                for rate in CHOICE_RATES
            }
            rows.append(
                {
                    "examined": examined,
                    "arm": arm,
                    "minus_exgrpo": {rate: row for rate, row in found.items() if row},
                    "from_step_1": gap(runs, CORNER, from_step_1(arm), f"{LOSING} again"),
                }
            )
    return rows


def again_rows(runs: list[dict]) -> list[dict]:
    """The runs that were made twice: held-out accuracy of both."""
    first = {key_of(run): run for run in runs}
    return [
        {
            "arm": run["arm"].removesuffix(" again"),
            "seed": run["seed"],
            "first": first[CORNER, run["arm"].removesuffix(" again"), run["seed"]]["end"],
            "again": run["end"],
        }
        for run in runs
        if run["arm"] in AGAIN
    ]


def gap(runs: list[dict], rate: float, arm: str, base: str) -> dict | None:
    """Held-out accuracy at the end, arm minus base, over the seeds that have both."""
    pairs = pairs_of(runs, rate, arm, base)
    gaps = [run["end"] - other["end"] for run, other in pairs if run["start"] == other["start"]]
    return interval(gaps) if gaps else None


def pairs_of(runs: list[dict], rate: float, arm: str, base: str) -> list[tuple[dict, dict]]:
    """The runs of an arm, each with the run of the same seed of `base` where there is one."""
    by_key = {key_of(run): run for run in runs}
    return [
        (run, other)
        for run in runs
        if key_of(run)[:2] == (rate, arm) and (other := by_key.get((rate, base, run["seed"])))
    ]


def print_table(rows: list[dict]) -> None:
    print(
        f"{'start %':>8} {'':36}{'seeds':>5}{'end %':>7}{'- on-policy':>13}{'':16}{'at equal tokens':>16}"
    )
    for row in rows:
        gap, equal = row["minus_on_policy"], row["minus_on_policy_at_equal_tokens"]
        print(
            f"{100 * row['start']:8.1f} {row['arm']:36}{row['seeds']:5}"
            f"{100 * row['end']['mean']:7.1f}{100 * gap['mean']:+13.1f}{bounds(gap):>16}"
            f"{100 * equal['mean']:+16.1f}{bounds(equal):>16}"
        )


def draw(results: dict, path: Path) -> None:
    """What each method gains on on-policy by starting success rate; and where the runs of the
    corner ended, a dot a seed."""
    title = f"small sums, {results['device']}, {results['date']}"
    with panels(path, size=(13, 5), title=title) as (left, right):
        corner = results["corner"]
        rows = {(row["rate"], row["arm"]): row for row in results["table"]}
        rates = sorted({rate for rate, _ in rows})
        everywhere = [arm for rate, arm in rows if rate == max(rates)]
        for place, arm in enumerate(everywhere):
            gaps = [rows[rate, arm]["minus_on_policy"] for rate in rates]
            xs = [i + 0.08 * (place - len(everywhere) / 2) for i in range(len(rates))]
            left.plot(
                xs, [100 * gap["mean"] for gap in gaps], "o", color=f"C{place}", label=arm, ms=4
            )
            for x, gap in zip(xs, gaps, strict=True):
                if gap["low"] is not None:
                    left.plot(
                        [x, x], [100 * gap["low"], 100 * gap["high"]], color=f"C{place}", lw=1
                    )
        left.set_xticks(range(len(rates)), [f"{100 * rate:.0f}" for rate in rates])
        left.axhline(0, color="grey", lw=0.6)
        left.set_ylim(-60, 60)
        left.set_xlabel("correct at the start, about, %")
        left.set_ylabel("held-out accuracy minus on-policy, points")
        left.set_title("at equal completions; bars: 95 % over seeds, cut at 60 points", fontsize=9)
        left.legend(frameon=False, fontsize=7, loc="upper right")

        arms = [arm for (rate, arm), row in rows.items() if rate == corner and not row["is_choice"]]
        for place, arm in enumerate(arms):
            ends = [100 * value for value in rows[corner, arm]["end"]["values"]]
            right.plot(ends, [place] * len(ends), "o", color="C0", alpha=0.6, ms=6)
        right.set_yticks(range(len(arms)), arms, fontsize=8)
        right.invert_yaxis()
        right.set_xlim(0, 100)
        right.set_xlabel("held-out accuracy at the end, %")
        right.set_title(
            f"starting with about {100 * corner:.0f} % correct, a dot a seed", fontsize=9
        )
