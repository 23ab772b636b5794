"""How many answers does the reward pool judge, and what do hostile ones cost?

    PYTHONPATH=.:kernels python bench/rewards.py [--rows 4000 --workers 2]

Five measurements, the peer (math-verify called in this process, with its stock limits of 5 s + 5 s)
in the same run:

- clean: GSM8K-like rows, all distinct, so that nothing is gained by scoring equal ones once;
- formulas: pairs in the style of math-verify's own tests, generated here, because the installed
  package ships none;
- hostile: every answer of adversarial.py that deserves nothing, one in a hundred rows;
- hostile sample: a few of them, also in this process;
- stuck: every worker stopped by a signal while rows are waiting.

Rates are per CPU-second, of this process and all workers, and so hardly depend on what else runs on
the machine. `cpu_normalised` is that times the workers, as if they ran undisturbed. In the hostile
measurement workers are replaced after 5,000 jobs, with and without hostile rows, and that counts. A
time-out is one of CPU time, so it costs the same on a busy machine, unless that is so busy that the
limit by the clock comes first: `timeouts_by_the_clock` counts those. The last line of stdout is
JSON; --out gives the folder of rewards.json.
"""

import argparse
import datetime
import importlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from loss import installed, machine

from exgrpo_fast.rewards import RewardPool, RewardSample, ScoreFuture, Verdict
from exgrpo_fast.rewards.selftest.adversarial import (
    IN_TIME_MS,
    Adversarial,
    adversarial_answers,
    box,
)
from exgrpo_fast.rewards.verifiers.mathematics import MATH_SECONDS

PACKAGES = ("math-verify", "latex2sympy2_extended", "sympy", "antlr4-python3-runtime", "gmpy2")
ROWS_PER_HOSTILE = 100
MEMORY_GOAL_MB = 512


# ---- rows ----------------------------------------------------------------------------------------

SAMPLE_STEPS = "She buys {} at {} each and gives {} away, so that {} are left. "


def clean_rows(count: int, seed: int) -> list[RewardSample]:
    """GSM8K-like: an integer at the end of a few sentences, right in three of five."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        gold = rng.choice((rng.randrange(1, 100), rng.randrange(100, 100_000)))
        found = gold if rng.random() < 0.6 else gold + rng.randrange(1, 50)
        steps = "".join(SAMPLE_STEPS.format(*rng.sample(range(900), 4)) for _ in range(5))
        rows.append(RewardSample(f"question {index}", steps + box(written(found, rng)), str(gold)))
    return rows


def written(value: int, rng: random.Random) -> str:
    ways = [f"{value}"] * 6 + [f"{value}.00", f"\\${value}", f"{value:,}", f"{value} \\text{{ cm}}"]
    return rng.choice(ways)


def formula_rows(count: int, seed: int) -> list[RewardSample]:
    """MATH-like: one formula written in two ways, or two that differ in one number."""
    rng = random.Random(seed)
    rows: dict[tuple[str, str], RewardSample] = {}
    while len(rows) < count:
        a, b, c = rng.randrange(2, 40), rng.randrange(2, 40), rng.randrange(41, 80)
        gold, found = rng.choice(FORMULAS)(a, b, c)
        if rng.random() < 0.4:
            found = found.replace(str(a), str(a + 1))
        rows[gold, found] = RewardSample("", box(found), gold)
    return list(rows.values())


FORMULAS: list[Callable[[int, int, int], tuple[str, str]]] = [
    lambda a, b, c: (f"\\frac{{{a}}}{{{c}}}", f"\\dfrac{{{2 * a}}}{{{2 * c}}}"),
    lambda a, b, c: (f"\\frac{{{a}}}{{8}}", f"{a / 8}"),
    lambda a, b, c: (f"-\\frac{{{a}}}{{{c}}}", f"\\frac{{-{a}}}{{{c}}}"),
    lambda a, b, c: (f"{a}\\sqrt{{{c}}}", f"\\sqrt{{{c}}} \\cdot {a}"),
    lambda a, b, c: (f"{a}+{b}\\sqrt{{{c}}}", f"{b}\\sqrt{{{c}}} + {a}"),
    lambda a, b, c: (f"\\frac{{{a}\\pi}}{{{c}}}", f"\\frac{{{a}}}{{{c}}}\\pi"),
    lambda a, b, c: (f"({a}, {b})", f"\\left({a},\\, {b}\\right)"),
    lambda a, b, c: (f"[{a},{c})", f"\\left[{a}, {c}\\right)"),
    lambda a, b, c: (f"(-\\infty,{a})\\cup({c},\\infty)", f"({c},\\infty) \\cup (-\\infty,{a})"),
    lambda a, b, c: (f"\\{{{a},{c}\\}}", f"\\{{{c}, {a}\\}}"),
    lambda a, b, c: (f"{a},-{b}", f"-{b}, {a}"),
    lambda a, b, c: (f"x^2+{a}x+{b}", f"{a}x + x^2 + {b}"),
    lambda a, b, c: (f"{a}x+{b}y", f"{b}y+{a}x"),
    lambda a, b, c: (f"y={a}x+{b}", f"y = {b} + {a}x"),
    lambda a, b, c: (f"{a}-{b}i", f"-{b}i+{a}"),
    lambda a, b, c: (f"x={a}", f"{a}"),
    lambda a, b, c: (f"{a}^{{{b % 7 + 2}}}", f"{a ** (b % 7 + 2)}"),
    lambda a, b, c: (f"\\log_{{2}}({a})", f"\\frac{{\\ln {a}}}{{\\ln 2}}"),
    lambda a, b, c: (f"\\frac{{1}}{{x+{a}}}", f"(x+{a})^{{-1}}"),
    lambda a, b, c: (
        f"\\begin{{pmatrix}} {a} \\\\ {b} \\end{{pmatrix}}",
        f"\\begin{{pmatrix}} {a} \\\\ \\frac{{{2 * b}}}{{2}} \\end{{pmatrix}}",
    ),
    lambda a, b, c: (f"{a}^\\circ", f"{a}^{{\\circ}}"),
    lambda a, b, c: (f"{a} < x < {c}", f"{a}<x<{c}"),
    lambda a, b, c: (f"\\binom{{{a + 9}}}{{2}}", f"{(a + 9) * (a + 8) // 2}"),
]


def with_hostile(
    rows: Sequence[RewardSample], hostile: Sequence[Adversarial]
) -> list[RewardSample]:
    """A hostile row behind each 99 others."""
    mixed, others = [], iter(rows)
    for adversarial in hostile:
        mixed += [next(others) for _ in range(ROWS_PER_HOSTILE - 1)]
        mixed.append(RewardSample("", adversarial.completion, adversarial.gold))
    return mixed


# ---- judges --------------------------------------------------------------------------------------


def in_process(rows: Sequence[RewardSample]) -> list[bool]:
    """What trainers without a pool do. The limits are the package's own."""
    math_verify = importlib.import_module("math_verify")
    target = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]
    verdicts = []
    for row in rows:
        gold = math_verify.parse(f"\\boxed{{{row.answer}}}", target)
        verdicts.append(bool(math_verify.verify(gold, math_verify.parse(row.completion, target))))
    return verdicts


class WatchedPool(RewardPool):
    """Notes the peak of each worker's memory before it is gone."""

    peak_mb = 0.0

    def _remove(self, worker: Any) -> None:
        self.look(worker)
        super()._remove(worker)

    def look(self, worker: Any) -> None:
        for line in Path(f"/proc/{worker.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                self.peak_mb = max(self.peak_mb, int(line.split()[1]) / 1024)

    def peak(self) -> float:
        for worker in self._workers:
            self.look(worker)
        return round(self.peak_mb, 1)

    def warm(self) -> None:
        """Wait until all workers are ready, the spare too."""
        self.check()
        while len(self._workers) <= self._max_busy or not all(w.ready for w in self._workers):
            self.poll()
            time.sleep(0.01)

    def cpu_seconds(self) -> float:
        """Of this process, of the workers, and of those that are gone."""
        mine = sum(os.times()[:4])
        ticks = os.sysconf("SC_CLK_TCK")
        for worker in [*self._workers, *self._killed]:
            stat = Path(f"/proc/{worker.process.pid}/stat").read_text().rpartition(")")[2].split()
            mine += (int(stat[11]) + int(stat[12])) / ticks
        return mine


def timed_pool(pool: WatchedPool, rows: Sequence[RewardSample]) -> tuple[list[Verdict], dict]:
    pool.warm()
    cpu, wall = pool.cpu_seconds(), time.perf_counter()
    scored = pool.score(rows)
    wall, cpu = time.perf_counter() - wall, pool.cpu_seconds() - cpu
    return scored, rates(len(rows), wall, cpu, cores=pool._max_busy)


def timed_in_process(rows: Sequence[RewardSample]) -> tuple[list[bool], dict]:
    in_process(rows[:1])
    cpu, wall = time.process_time(), time.perf_counter()
    verdicts = in_process(rows)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return verdicts, rates(len(rows), wall, cpu, cores=1)


def rates(count: int, wall: float, cpu: float, *, cores: int) -> dict[str, float]:
    per_cpu = count / cpu
    return {
        "rows": count,
        "wall_seconds": round(wall, 2),
        "cpu_seconds": round(cpu, 2),
        "per_wall_second": round(count / wall, 1),
        "per_cpu_second": round(per_cpu, 1),
        "cpu_normalised": round(per_cpu * cores, 1),
    }


# ---- measurements --------------------------------------------------------------------------------


def compare(pool: WatchedPool, rows: Sequence[RewardSample], peer_rows: int) -> dict[str, Any]:
    """The pool on all rows, the peer on the first of them, and where they differ."""
    scored, ours = timed_pool(pool, rows)
    peer, theirs = timed_in_process(rows[:peer_rows])
    differ = [
        {"gold": row.answer, "completion": row.completion[-80:], "pool": s.reason, "peer": other}
        for row, s, other in zip(rows, scored, peer, strict=False)
        if (s.reward == 1.0) != other
    ]
    return {
        "pool": ours,
        "in_process": theirs,
        "compared": len(peer),
        "right": sum(peer),
        "different": differ,
    }


def hostile(pool: WatchedPool, seed: int) -> dict[str, Any]:
    """All adversarial answers among honest rows, against the same rows alone."""
    adversarial = [n for n in adversarial_answers() if not n.correct]
    random.Random(seed).shuffle(adversarial)
    others = clean_rows((ROWS_PER_HOSTILE - 1) * len(adversarial), seed + 1)
    alone, clean = timed_pool(pool, others)
    scored, mixed = timed_pool(pool, with_hostile(others, adversarial))
    of_adversarial = scored[ROWS_PER_HOSTILE - 1 :: ROWS_PER_HOSTILE]
    of_others = [s for i, s in enumerate(scored) if (i + 1) % ROWS_PER_HOSTILE]
    cpu_ms = 1000 * (mixed["cpu_seconds"] - clean["cpu_seconds"]) / len(adversarial)
    return {
        "clean": clean,
        "pool": mixed,
        "answers": len(adversarial),
        "slowest_ms": max(s.milliseconds for s in of_adversarial),
        "late": names(adversarial, of_adversarial, lambda s: s.milliseconds > IN_TIME_MS),
        "accepted": names(adversarial, of_adversarial, lambda s: s.reward == 1.0),
        "wrong_on_other_rows": sum(
            a.reward != b.reward for a, b in zip(alone, of_others, strict=True)
        ),
        "reasons": dict(Counter(s.reason for s in of_adversarial).most_common()),
        "timeouts_by_the_clock": sum(
            s.reason == "timeout" and s.milliseconds >= 1000 * MATH_SECONDS for s in of_adversarial
        ),
        "cpu_ms_per_hostile_row": round(cpu_ms, 1),
        "wall_ms_per_hostile_row": round(fmean(s.milliseconds for s in of_adversarial), 1),
    }


def names(
    adversarial: Sequence[Adversarial], scored: Iterable[Verdict], bad: Callable[[Verdict], bool]
) -> list[str]:
    return [n.name for n, s in zip(adversarial, scored, strict=True) if bad(s)]


def hostile_sample(pool: WatchedPool, count: int, seed: int) -> dict[str, Any]:
    """Few enough for the peer, which spends seconds on each."""
    adversarial = [n for n in adversarial_answers() if not n.correct and len(n.completion) < 10_000]
    chosen = random.Random(seed).sample(adversarial, count)
    rows = with_hostile(clean_rows((ROWS_PER_HOSTILE - 1) * count, seed + 2), chosen)
    return {"names": [n.name for n in chosen], **compare(pool, rows, len(rows))}


def stuck(workers: int, rows: Sequence[RewardSample]) -> dict[str, Any]:
    """Stop every worker by a signal while rows are waiting, and go on calling."""
    with WatchedPool(["math_verify"], workers=workers) as pool:
        pool.warm()
        expected = [s.reward for s in pool.score(rows)]
        pool.warm()
        for worker in pool._workers:
            os.kill(worker.process.pid, signal.SIGSTOP)
        ticket, calls = ScoreFuture(), []
        started = time.perf_counter()
        for start in range(0, len(rows), 64):
            calls.append(
                milliseconds(lambda s=start: pool.submit(rows[s : s + 64], append_to=ticket))
            )
        while not ticket.done:
            calls.append(milliseconds(pool.poll))
            time.sleep(0.005)
        scored = pool.verdicts(ticket)
        lost = [s.reason for s in scored if s.reason == "timeout"]
        return {
            "stopped_workers": workers + 1,
            "rows": len(rows),
            "seconds": round(time.perf_counter() - started, 2),
            "timeouts": len(lost),
            "wrong_on_other_rows": sum(
                s.reward != e
                for s, e in zip(scored, expected, strict=True)
                if s.reason != "timeout"
            ),
            "calls": len(calls),
            "call_ms_p99": round(sorted(calls)[int(0.99 * len(calls))], 2),
            "call_ms_max": round(max(calls), 2),
        }


def milliseconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - started)


def hostile_costs(results: dict[str, Any]) -> dict[str, float]:
    """CPU time with one hostile row in a hundred, in units of the CPU time of clean rows."""
    bad, clean, formulas = results["hostile"], results["clean"], results["formulas"]

    def cost(clean_rate: float, row_ms: float, hostile_ms: float) -> float:
        return round((row_ms + hostile_ms / ROWS_PER_HOSTILE) * clean_rate / 1000, 2)

    rate, formula_rate = bad["clean"]["per_cpu_second"], formulas["pool"]["per_cpu_second"]
    peer_rate = clean["in_process"]["per_cpu_second"]
    cpu_ms = bad["cpu_ms_per_hostile_row"]
    return {
        "of_the_pool": cost(rate, 1000 / rate, cpu_ms),
        "of_the_pool_with_formulas": cost(formula_rate, 1000 / formula_rate, cpu_ms),
        "of_in_process": cost(peer_rate, 1000 / rate, cpu_ms),
        "in_process_itself": round(
            peer_rate / results["hostile_sample"]["in_process"]["per_cpu_second"], 2
        ),
    }


def goals(results: dict[str, Any]) -> dict[str, bool]:
    """The promises, and whether this run kept them."""
    clean, formulas, bad = results["clean"], results["formulas"], results["hostile"]
    costs = results["hostile_costs"]
    return {
        "1000 GSM8K-like verdicts per CPU-second x workers": clean["pool"]["cpu_normalised"] >= 1000,
        "70 MATH-like verdicts per CPU-second x workers": formulas["pool"]["cpu_normalised"] >= 70,
        "verdicts as in process": not clean["different"] and not formulas["different"],
        "1 % hostile rows cost 3.5 x at most": costs["of_the_pool"] <= 3.5,
        "the same, formulas": costs["of_the_pool_with_formulas"] <= 3.5,
        "the same, of math-verify in process": costs["of_in_process"] <= 3.5,
        "every adversarial answer within 2.5 s": not bad["late"],
        "no adversarial answer accepted": not bad["accepted"],
        "no wrong verdict on any other row": not bad["wrong_on_other_rows"],
        f"no worker above {MEMORY_GOAL_MB} MB": results["worker_peak_mb"] <= MEMORY_GOAL_MB,
        "stuck workers stop nobody": results["stuck"]["wrong_on_other_rows"] == 0,
        "no call above 50 ms": results["stuck"]["call_ms_max"] <= 50,
    }  # fmt: skip


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    seed, workers = arguments.seed, arguments.workers
    results: dict[str, Any] = {
        "bench": "rewards",
        "date": datetime.date.today().isoformat(),
        **machine("cpu"),
        **{name: version for name in PACKAGES if (version := installed(name))},
        "workers": workers,
        "seed": seed,
    }
    with WatchedPool(["math_verify"], workers=workers) as pool:
        results["clean"] = compare(pool, clean_rows(arguments.rows, seed), arguments.peer_rows)
        formulas = formula_rows(arguments.formulas, seed)
        results["formulas"] = compare(pool, formulas, len(formulas))
        results["hostile"] = hostile(pool, seed)
        results["hostile_sample"] = hostile_sample(pool, arguments.peer_hostile, seed)
        results["worker_peak_mb"] = pool.peak()
    results["stuck"] = stuck(workers, clean_rows(1000, seed + 3))
    results["load_average"] = round(os.getloadavg()[0], 2)
    results["hostile_costs"] = hostile_costs(results)
    return {**results, "goals": goals(results)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Throughput and safety of the reward pool.")
    parser.add_argument("--rows", type=int, default=4000, help="GSM8K-like rows")
    parser.add_argument("--peer-rows", type=int, default=2000, help="those the peer judges, too")
    parser.add_argument("--formulas", type=int, default=260, help="MATH-like pairs")
    parser.add_argument("--peer-hostile", type=int, default=5, help="hostile rows for the peer")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu")
    arguments = parser.parse_args()
    results = measure(arguments)
    for name, kept in results["goals"].items():
        print(f"{'yes' if kept else 'NO ':3s} {name}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "rewards.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
