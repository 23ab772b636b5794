"""Rewards that fail on every sample, or between samples: said before a run, never scored as 0."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import make_questions

from exgrpo_fast.build.rewards import check_rewards
from exgrpo_fast.config import validate
from exgrpo_fast.core.types import Verdict
from exgrpo_fast.rewards import RewardError, RewardPool, RewardSample
from exgrpo_fast.rewards.pool import worker
from exgrpo_fast.rewards.pool.calling import SoftTimeout
from exgrpo_fast.rewards.pool.jobs import refuse_failing_reward

REWARDS = '''
import asyncio
from dataclasses import dataclass

def for_messages(completions, answer, **columns):
    return [float(gold in c[-1]["content"]) for c, gold in zip(completions, answer)]

def wants_level(completions, level):
    return [float(level[0])]

def one_by_one(data_source, solution_str, ground_truth, extra_info=None):
    return float(ground_truth in solution_str)

def unreturned(completions, **columns):
    [1.0 for _ in completions]

def forgets(completions, **columns):
    return [1.0, 2.0]

def strict(completions, **columns):
    return [float(c.split("answer is")[1].strip(" .") == "3") for c in completions]

def fine(completions, **columns):
    return [0.0 for _ in completions]

def slow(completions, **columns):
    while True:
        pass

@dataclass
class Weighted:
    weight: float

    def __call__(self, completions, **columns):
        return [self.weight for _ in completions]

    async def later(self, completions, **columns):
        return [self.weight for _ in completions]

weighted = Weighted(0.5)
later = weighted.later
unhashable = {"not": "callable"}

class Connection:
    """A client with a task of its own in the loop it was made in."""
    task = None

    async def ask(self, text):
        if self.task is None:
            self.queue = asyncio.Queue()
            self.task = asyncio.get_running_loop().create_task(self.serve())
        answer = asyncio.get_running_loop().create_future()
        await self.queue.put((text, answer))
        return await answer

    async def serve(self):
        while True:
            text, answer = await self.queue.get()
            if text != "never":
                answer.set_result(float(len(text)))

connection = Connection()

async def kept_client(completions, **columns):
    return list(await asyncio.gather(*(connection.ask(c) for c in completions)))

async def blocks(completions, **columns):
    if completions[0] == "block":
        while True:
            pass
    return [await connection.ask(completions[0])]

async def own_timeout(completions, **columns):
    await asyncio.wait_for(asyncio.sleep(60), 0.01)

def long_in_c(prompt, completion, answer):
    return float(sum(range(int(completion))))

long_in_c.max_seconds = long_in_c.max_cpu_seconds = 0.02
'''


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "own.py"
    path.write_text(REWARDS)
    return path


def scored(reference: str, *texts: str, seconds: float = 5.0) -> list[tuple[float, str]]:
    with RewardPool([reference], workers=1, timeout_seconds=seconds) as pool:
        return [s[:2] for s in pool.score([RewardSample("q", text, "3") for text in texts])]


# --- one real row before the first step -----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "for_messages",
            r"TypeError: string indices .* \(own.py, line 6\); completions are texts, not",
        ),
        ("wants_level", "asks for the column 'level'; columns there: answer, truncated"),
        ("one_by_one", "asks for the column 'data_source'"),
        ("unreturned", "returned None instead of a list; is a `return` missing"),
        ("forgets", "returned 2 rewards for 1 completions"),
        ("slow", "stopped at its time limit"),
        ("own_timeout", r"TimeoutError \(own.py, line 7.\)"),
    ],
)
def test_a_reward_that_fails_on_a_real_row_is_refused(
    tokenizer, rewards, name: str, message: str
) -> None:
    config = validate(
        {"reward": {"functions": ["exact", f"{rewards}:{name}"], "timeout_seconds": 0.4}}
    )
    [question] = make_questions(tokenizer, ["a"])
    with RewardPool(config.reward.functions, workers=1, timeout_seconds=0.4) as pool:
        with pytest.raises(RewardError, match=f"^reward own.py:{name}: {message}"):
            check_rewards(config, pool, question)


@pytest.mark.parametrize("name", ["strict", "fine", "weighted", "later", "kept_client"])
def test_a_reward_that_can_tell_something_is_taken(tokenizer, rewards, name: str) -> None:
    """`strict` raises on what it cannot read: that is a fault of the completion."""
    config = validate({"reward": {"functions": [f"{rewards}:{name}"]}})
    [question] = make_questions(tokenizer, ["a"])
    with RewardPool(config.reward.functions, workers=1) as pool:
        check_rewards(config, pool, question)


def test_a_run_whose_rewards_are_nearly_all_errors_stops_with_the_error() -> None:
    error = Verdict(0.0, "error:TypeError")
    with pytest.raises(RewardError, match=r"^19 of 20 rewards are errors; reward f: TypeError"):
        refuse_failing_reward([Verdict(0.0, "wrong"), *[error] * 19], "reward f: TypeError")
    refuse_failing_reward([*[Verdict(0.0, "wrong")] * 2, *[error] * 18], "")
    refuse_failing_reward([error] * 3, "")  # too few to tell
    refuse_failing_reward([], "")


def test_a_step_stops_when_the_reward_breaks_later(tokenizer, make_test_trainer) -> None:
    trainer = make_test_trainer(make_questions(tokenizer, "abcd"), function="raises_on_wrong")
    with pytest.raises(RewardError, match="of 16 rewards are errors; .*RuntimeError: no idea"):
        trainer.step()


# --- kinds of functions ---------------------------------------------------------------------------


def test_objects_with_a_call_are_rewards_hashable_or_not(rewards) -> None:
    assert scored(f"{rewards}:weighted", "x", "y") == [(0.5, "ok")] * 2
    assert scored(f"{rewards}:later", "x") == [(0.5, "ok")]


def test_a_client_that_an_async_reward_keeps_works_in_every_call(rewards) -> None:
    assert scored(f"{rewards}:kept_client", "a", "bb", "ccc") == [
        (1.0, "ok"),
        (2.0, "ok"),
        (3.0, "ok"),
    ]


@pytest.mark.parametrize(("name", "late"), [("kept_client", "never"), ("blocks", "block")])
def test_and_after_a_call_that_was_late(rewards, name: str, late: str) -> None:
    found = scored(f"{rewards}:{name}", "a", late, "ccc", seconds=0.5)
    assert found == [(1.0, "ok"), (0.0, "timeout"), (3.0, "ok")]


# --- alarms behind the job ------------------------------------------------------------------------


def test_a_long_call_into_c_costs_its_own_sample_and_no_worker(rewards) -> None:
    """Both alarms wait until the call returns; the second one finds the job done."""
    with RewardPool([f"{rewards}:long_in_c"], workers=1) as pool:
        pool.check(RewardSample("q", "1", "3"))
        process = pool._workers[0].process
        found = pool.score([RewardSample("q", str(8_000_000 + i), "3") for i in range(8)])
        assert {s[:2] for s in found} == {(0.0, "timeout")}
        assert pool.score([RewardSample("q", "3", "3")])[0][:2] == (3.0, "ok")
        assert process.poll() is None


def test_an_alarm_raises_inside_a_reward_and_nowhere_else() -> None:
    worker._set_timers(60.0, 60.0)
    try:
        for number in (signal.SIGALRM, signal.SIGPROF):
            with pytest.raises(SoftTimeout):
                worker._interruptible(lambda n=number: signal.raise_signal(n) or [])
            signal.raise_signal(number)  # where a result is sent
    finally:
        worker._stop_timers()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)


# --- several functions ----------------------------------------------------------------------------


def test_the_fault_of_one_function_is_not_hidden_by_the_verdict_of_another(rewards) -> None:
    with RewardPool(["exact", f"{rewards}:for_messages"], workers=1) as pool:
        [found] = pool.score([RewardSample("q", "4", "3")])
    assert found[:2] == (0.0, "error:TypeError")
