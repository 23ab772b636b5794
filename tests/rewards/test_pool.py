"""The reward pool: whatever a reward does, it costs its own sample and nothing else."""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from exgrpo_fast.cli.score import score_file
from exgrpo_fast.rewards import RewardError, RewardPool, RewardSample
from exgrpo_fast.rewards.verifiers.functions import exact

REWARDS = '''
import ctypes, os, signal, subprocess, sys, time

def trl(prompts, completions, answer, **columns):
    """TRL's signature: lists in, list out."""
    assert isinstance(prompts, list) and isinstance(completions, list)
    return [1.0 if gold in text else 0.0 for text, gold in zip(completions, answer)]

def narrow(completions, difficulty):
    return [difficulty[0] / 10]

def columns_of(completions, **columns):
    return [(float(len(columns)), "-".join(sorted(columns)))]

def half(completions, **columns):
    return [0.5]

def no_opinion(completions, **columns):
    return [None]

async def waits(completions, **columns):
    return [0.25]

def obeys(completions, **columns):
    """Does what the completion says."""
    text = completions[0]
    if text == "raise":
        raise ValueError("no such answer")
    if text == "exit":
        sys.exit(3)
    if text == "sleep":
        time.sleep(60)
    if text == "swallow":
        while True:
            try:
                time.sleep(60)
            except BaseException:
                pass
    if text == "deaf":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        time.sleep(60)
    if text == "die":
        os._exit(7)
    if text == "segfault":
        ctypes.string_at(0)
    if text == "die once" and not os.path.exists(columns["marker"][0]):
        open(columns["marker"][0], "w").close()
        os._exit(7)
    if text == "print":
        print('{"id": 0, "ms": 0, "results": [[9.0, "ok", ""]]}', flush=True)
        os.write(1, b"not json\\n")
        subprocess.run(["echo", "hello"], check=True)
    if text == "read":
        return [float(len(sys.stdin.read()))]
    if text == "allocate":
        hoard = [bytes(1 << 28) for _ in range(400)]
    if text == "environment":
        return [(float("SECRET_TOKEN" in os.environ), os.environ["CUDA_VISIBLE_DEVICES"] or "none")]
    if text == "child":
        child = subprocess.Popen(["sleep", "300"])
        open(columns["marker"][0], "w").write(str(child.pid))
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        time.sleep(60)
    if text in RETURNS:
        return RETURNS[text]
    return [1.0]

RETURNS = {
    "nan": [float("nan")], "inf": [float("inf")], "text": ["1.0"], "nothing": None, "two": [1, 2],
    "empty": [], "bare": 1, "true": [True], "dict": [{}], "reason": [(0.5, "short")],
}
'''


@pytest.fixture(scope="module")
def rewards(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture(scope="module")
def obedient(rewards):
    """A pool whose reward does what the completion says; 1 s a sample."""
    with RewardPool(
        [f"{rewards}:obeys"], workers=2, timeout_seconds=1.0, memory_bytes=1 << 30
    ) as pool:
        pool.check()
        yield pool


def sample(completion: str, answer: str = "42", **columns) -> RewardSample:
    return RewardSample("q", completion, answer, columns)


def outcomes(pool: RewardPool, *completions: str) -> list[tuple[float, str]]:
    return [(v.reward, v.reason) for v in pool.score([sample(text) for text in completions])]


# --- the signature --------------------------------------------------------------------------------


def test_verdicts_come_in_order_with_columns_and_time(rewards) -> None:
    with RewardPool([f"{rewards}:trl"], workers=2) as pool:
        samples = [sample(f"it is {i}", answer=str(i - i % 3)) for i in range(1, 100)]
        verdicts = pool.score(samples)
    assert [v.reward for v in verdicts] == [float(str(i - i % 3) in str(i)) for i in range(1, 100)]
    assert {v.reason for v in verdicts} == {"ok"}
    assert all(0 <= v.milliseconds < 1000 for v in verdicts)


def test_a_function_gets_the_columns_that_it_asks_for(rewards) -> None:
    with RewardPool([f"{rewards}:columns_of"], workers=1) as pool:
        [verdict] = pool.score([sample("x", difficulty=3, tests=[1])])
        assert verdict[:2] == (4.0, "answer-difficulty-prompts-tests")
    with RewardPool([f"{rewards}:narrow"], workers=1) as pool:
        assert pool.score([sample("x", difficulty=3, other=1)])[0].reward == 0.3
        assert pool.score([sample("x", other=1)])[0][:2] == (0.0, "missing_column")
        pool.check()  # a made-up sample cannot have the columns
        with pytest.raises(RewardError, match="narrow: asks for the column 'difficulty'; columns "
                           "there: answer, other"):  # fmt: skip
            pool.check(sample("x", other=1))


def test_several_functions_are_added_up(rewards) -> None:
    names = [f"{rewards}:half", f"{rewards}:no_opinion", "exact", f"{rewards}:waits"]
    with RewardPool(names, weights=[2.0, 100.0, 1.0, 4.0], workers=1) as pool:
        assert outcomes(pool, "42", "41") == [(3.0, "ok"), (2.0, "wrong")]
    with RewardPool([f"{rewards}:no_opinion"], workers=1) as pool:
        assert outcomes(pool, "42") == [(0.0, "unscored")]


def test_functions_can_be_handed_over_as_objects(rewards) -> None:
    sys.path.insert(0, str(rewards.parent))
    try:
        own = importlib.import_module("rewards")
        with RewardPool([own.half, exact], workers=1) as pool:
            assert pool.functions == [f"{rewards}:half", "exact"]
            assert outcomes(pool, "42") == [(1.5, "ok")]
    finally:
        sys.path.remove(str(rewards.parent))


def test_functions_without_a_name_are_refused_with_advice() -> None:
    def nested(completions, **columns):
        return [1.0]

    with pytest.raises(RewardError, match="a lambda: .* define it with `def` at the top level"):
        RewardPool([lambda completions, **columns: [1.0]])
    with pytest.raises(RewardError, match="nested' is not at the top level of its file"):
        RewardPool([nested])
    with pytest.raises(RewardError, match="is a type: .* write a function at the top level"):
        RewardPool([dict])
    with pytest.raises(RewardError, match="2 reward weights for 1 functions"):
        RewardPool(["exact"], weights=[1, 2])
    with pytest.raises(RewardError, match="expected a list"):
        RewardPool("exact")


def test_a_file_that_starts_a_pool_when_imported_is_told_so(tmp_path) -> None:
    (tmp_path / "script.py").write_text(
        textwrap.dedent("""
        from exgrpo_fast.rewards import RewardPool
        def mine(completions, **columns):
            return [1.0]
        pool = RewardPool([mine])
    """)
    )
    with RewardPool([f"{tmp_path}/script.py:mine"], workers=1) as pool:
        with pytest.raises(RewardError, match="put the start of the run under `if __name__"):
            pool.check()


def test_check_reports_a_function_that_does_not_import_or_run(rewards, tmp_path) -> None:
    (tmp_path / "late.py").write_text("from math import *\nimport nowhere\n")
    with RewardPool([f"{tmp_path}/late.py:f"], workers=1) as pool:
        with pytest.raises(RewardError, match="does not import: ModuleNotFoundError"):
            pool.check()
    with RewardPool([f"{rewards}:obeys"], workers=1) as pool:
        with pytest.raises(
            RewardError, match=r"obeys: ValueError: no such answer \(rewards.py, line"
        ):
            pool.check(sample("raise"))


# --- what a reward may do wrong -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("does", "expected"),
    [
        ("raise", (0.0, "error:ValueError")),
        ("exit", (0.0, "error:SystemExit")),
        ("sleep", (0.0, "timeout")),
        ("swallow", (0.0, "timeout")),
        ("deaf", (0.0, "timeout")),
        ("die", (0.0, "worker_died")),
        ("segfault", (0.0, "worker_died")),
        ("print", (1.0, "ok")),
        ("read", (0.0, "ok")),
        ("allocate", (0.0, "error:MemoryError")),
        ("environment", (0.0, "none")),
        ("nan", (0.0, "not_a_number")),
        ("inf", (0.0, "not_a_number")),
        ("text", (0.0, "not_a_number")),
        ("nothing", (0.0, "not_a_number")),
        ("two", (0.0, "not_a_number")),
        ("empty", (0.0, "not_a_number")),
        ("dict", (0.0, "not_a_number")),
        ("bare", (1.0, "ok")),
        ("true", (1.0, "ok")),
        ("reason", (0.5, "short")),
    ],
)
def test_it_costs_its_own_sample_only(obedient, monkeypatch, does: str, expected) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hf_secret")
    started = time.perf_counter()
    others = [f"fine {i}" for i in range(20)]
    found = outcomes(obedient, *others[:5], does, *others[5:])
    assert found[5] == expected
    assert found[:5] + found[6:] == [(1.0, "ok")] * 20
    assert time.perf_counter() - started < 10.0


def test_a_worker_that_dies_once_is_forgiven(obedient, tmp_path) -> None:
    verdicts = obedient.score([sample("die once", marker=str(tmp_path / "died")), sample("fine")])
    assert [v.reward for v in verdicts] == [1.0, 1.0]
    assert (tmp_path / "died").exists()


def test_a_limit_on_the_work_stops_what_works_and_lets_wait_what_waits(tmp_path) -> None:
    """The clock goes on while others use the core, or a server takes its time; the work does not."""
    (tmp_path / "work.py").write_text(
        "import time\n"
        "def work(prompt, completion, answer):\n"
        "    if completion == 'busy':\n"
        "        while True: pass\n"
        "    time.sleep(0.6)\n"
        "    return 1.0\n"
        "work.max_cpu_seconds = 0.2\n"
    )
    with RewardPool([f"{tmp_path}/work.py:work"], workers=1, timeout_seconds=60) as pool:
        verdicts = pool.score([sample("waits"), sample("busy"), sample("waits too")])
    assert [(v.reward, v.reason) for v in verdicts] == [(1.0, "ok"), (0.0, "timeout"), (1.0, "ok")]


def test_workers_killed_from_outside_cost_no_verdict(rewards) -> None:
    with RewardPool([f"{rewards}:obeys"], workers=2) as pool:
        pool.check()
        kills, done = [], 0

        def kill_now_and_then(count: int) -> None:
            nonlocal done
            done += count
            if done // 100 > len(kills):
                kills.append(pool._workers[0].process.pid)
                os.kill(kills[-1], signal.SIGKILL)

        verdicts = pool.score([sample(f"{i}") for i in range(600)], on_finished=kill_now_and_then)
    assert len(kills) >= 3
    assert {v[:2] for v in verdicts} == {(1.0, "ok")}


def test_equal_samples_are_scored_once(rewards, tmp_path) -> None:
    (tmp_path / "count.py").write_text(
        "calls = []\ndef count(completions, **_):\n    calls.append(1)\n    return [len(calls)]\n"
    )
    with RewardPool([f"{tmp_path}/count.py:count"], workers=1) as pool:
        seen: list[int] = []
        samples = [sample("a"), sample("b"), sample("a"), sample("a", answer="43"), sample("b")]
        verdicts = pool.score(samples, on_finished=seen.append)
    assert [v.reward for v in verdicts] == [1.0, 2.0, 1.0, 3.0, 2.0]
    assert sum(seen) == 5


def test_errors_are_logged_once_per_kind(rewards, caplog) -> None:
    with RewardPool([f"{rewards}:obeys"], workers=1) as pool, caplog.at_level(logging.WARNING):
        pool.score([RewardSample(f"q{i}", "raise", "42") for i in range(20)])
    assert len(caplog.records) == 1
    assert "ValueError: no such answer" in caplog.text and "error:ValueError" in caplog.text


def test_strange_text_and_large_messages_go_through(rewards) -> None:
    with RewardPool([f"{rewards}:trl"], workers=1) as pool:
        strange = "\ud800\x00\u2028\n\r" + "x" * 3_000_000 + "42"
        assert outcomes(pool, strange, "42") == [(1.0, "ok")] * 2
        assert pool.score([]) == []


def test_an_interrupted_call_leaves_a_usable_pool(obedient) -> None:
    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        obedient.score([sample(f"interrupted {i}") for i in range(50)], on_finished=stop)
    assert outcomes(obedient, "fine", "raise") == [(1.0, "ok"), (0.0, "error:ValueError")]


# --- hostile mathematics --------------------------------------------------------------------------

HOSTILE = [
    "9^{9^{9}}",
    "9^{9^{9^{9}}}",
    "(9^9)^{(9^9)}",
    "10^{9999^{9999}}",
    "1000000!",
    "(999!)!",
    "\\sum_{i=1}^{9999999999} \\sin(i)",
    "\\prod_{i=1}^{9999} \\prod_{j=1}^{9999} (i+j)",
    "\\int_0^1 \\int_0^1 \\int_0^1 e^{xyz} \\sin(x^y) dx dy dz",
    "\\binom{9999}{5000}!",
    "(a+b+c+d)^{99} - (a+b+c+d)^{98}",
    "\\sqrt{\\sqrt{\\sqrt{\\sqrt{\\sqrt{2}}}}}",
]


def test_hostile_answers_stop_neither_the_pool_nor_the_others() -> None:
    honest = [
        RewardSample("q", f"so \\boxed{{\\frac{{{i}}}{{7}}}}", f"{i}/7") for i in range(1, 40)
    ]
    hostile = [RewardSample("q", f"so \\boxed{{{text}}}", "42") for text in HOSTILE]
    with RewardPool(["math_verify"], workers=2, timeout_seconds=1.5) as pool:
        pool.check()
        started = time.perf_counter()
        verdicts = pool.score([*honest[:20], *hostile, *honest[20:]])
        seconds = time.perf_counter() - started
    judged = verdicts[20 : 20 + len(HOSTILE)]
    assert [v.reward for v in judged] == [0.0] * len(HOSTILE)
    assert all(v.reason in ("wrong", "timeout") or v.reason.startswith("refused") for v in judged)
    assert all(v.milliseconds < 2000 for v in judged)
    others = verdicts[:20] + verdicts[20 + len(HOSTILE) :]
    assert {v[:2] for v in others} == {(1.0, "ok")}
    assert seconds < 1.5 * len(HOSTILE)


# --- no process outlives the pool -----------------------------------------------------------------


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def wait_until_gone(pids: list[int]) -> bool:
    end = time.monotonic() + 5.0
    while time.monotonic() < end and any(map(alive, pids)):
        time.sleep(0.02)
    return not any(map(alive, pids))


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


@needs_proc
def test_close_leaves_no_process_and_no_descriptor(rewards, tmp_path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with RewardPool([f"{rewards}:obeys"], workers=2, timeout_seconds=1.0) as pool:
        [verdict] = pool.score([sample("child", marker=str(tmp_path / "pid"))])
        assert verdict.reason == "timeout"
        assert wait_until_gone([int((tmp_path / "pid").read_text())])  # the reward's own child
        pids = [worker.process.pid for worker in pool._workers]
        assert pids
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)  # waited for, no zombies
    assert set(os.listdir("/proc/self/fd")) == before
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.score([])


@needs_proc
@pytest.mark.parametrize("how", ["SIGKILL", "exit"])
def test_workers_do_not_outlive_the_trainer(rewards, how: str) -> None:
    code = textwrap.dedent(f"""
        import os, sys, time
        from exgrpo_fast.rewards import RewardPool, RewardSample
        pool = RewardPool(["{rewards}:obeys"], workers=2, timeout_seconds=100)
        pool.check()
        print(*[w.process.pid for w in pool._workers], flush=True)
        if "{how}" == "exit":
            sys.exit(0)
        pool.score([RewardSample("q", "deaf", "42")])
    """)
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    pids = [int(pid) for pid in trainer.stdout.readline().split()]
    assert len(pids) in (2, 3)  # the spare may have been started
    if how == "SIGKILL":
        time.sleep(0.5)
        assert all(map(alive, pids))
        trainer.kill()
    trainer.wait(10)
    trainer.stdout.close()
    assert wait_until_gone(pids)


# --- a file of completions ------------------------------------------------------------------------


def test_score_writes_one_line_per_row(tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        '{"gold": "72", "completion": "\\\\boxed{72}"}\n'
        '{"gold": 72, "completion": "#### 71"}\n'
        "\n"
        '{"gold": "72"}\n'
        '{"gold": "1/2", "completion": "\\\\boxed{0.5}"}\n'
        '{"gold": "72", "completion": "\\\\boxed{72'
    )
    summary = score_file(tmp_path / "rows.jsonl", tmp_path / "out.jsonl", workers=1)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["reward"] for line in lines] == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert [line["reason"] for line in lines] == ["ok", "wrong", "bad_row", "ok", "bad_row"]
    assert set(lines[0]) == {"reward", "reason", "ms"}
    assert lines[2]["detail"] == f"{tmp_path}/rows.jsonl:4: missing field 'completion'"
    assert lines[4]["detail"] == f"{tmp_path}/rows.jsonl:6: truncated"
    assert (summary.num_rows, summary.reward_sum, summary.reasons["bad_row"]) == (5, 2.0, 2)
    assert str(summary).startswith("5 rows in ")
    assert not (tmp_path / "out.jsonl.partial").exists()
