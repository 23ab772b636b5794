"""Hostile answers: none stops the pool, none is accepted, and `reward-test` tells a bad reward."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import exit_code

from exgrpo_fast.rewards import RewardPool, RewardSample
from exgrpo_fast.rewards.selftest.adversarial import (
    IN_TIME_MS,
    Adversarial,
    adversarial_answers,
    box,
)
from exgrpo_fast.rewards.selftest.check_reward import built_in_golds, check_reward, golds_of
from exgrpo_fast.rewards.verifiers.functions import math_verify

ADVERSARIAL = adversarial_answers()
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


def test_there_are_enough_of_them_and_each_has_a_name() -> None:
    assert len(ADVERSARIAL) >= 148
    assert len({adversarial.name for adversarial in ADVERSARIAL}) == len(ADVERSARIAL)
    assert 10 <= sum(adversarial.correct for adversarial in ADVERSARIAL) <= 20


class WatchedPool(RewardPool):
    """Notes the peak of each worker's memory before it is gone."""

    peak_mb = 0.0

    def _remove(self, worker) -> None:
        status = Path(f"/proc/{worker.process.pid}/status").read_text()
        lines = [line for line in status.splitlines() if line.startswith("VmHWM")]
        self.peak_mb = max([self.peak_mb, *(int(line.split()[1]) / 1024 for line in lines)])
        super()._remove(worker)


@needs_proc
@pytest.mark.parametrize(
    "chosen",
    [ADVERSARIAL[::9], pytest.param(ADVERSARIAL, marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_adversarial_answers_cost_nothing_but_themselves(chosen: list[Adversarial]) -> None:
    samples, expected = [], []
    for number, adversarial in enumerate(chosen):
        honest = [(f"\\frac{{{number}}}{{7}}", True), (f"\\frac{{{number + 1}}}{{7}}", False)]
        samples += [RewardSample("", box(text), f"{number}/7") for text, _ in honest]
        samples.append(RewardSample("", adversarial.completion, adversarial.gold))
        expected += [float(right) for _, right in honest] + [float(adversarial.correct)]
    with WatchedPool(["math_verify"], workers=2) as pool:
        verdicts = pool.score(samples)
        for worker in list(pool._workers):
            pool._remove(worker)
        assert pool.peak_mb < 512
    wrong = [s.completion[-60:] for s, v, e in zip(samples, verdicts, expected, strict=True)
             if v.reward != e]  # fmt: skip
    assert wrong == []
    assert max(v.milliseconds for v in verdicts) < IN_TIME_MS
    reasons = {v.reason.partition(":")[0] for v in verdicts}
    assert reasons <= {"ok", "wrong", "no_answer", "refused", "timeout", "unit"}


QUICK = ("chain_", "hedge_", "bare_", "box_", "list_", "e_notation", "percent_", "honest_")


@pytest.mark.parametrize(
    "adversarial", [n for n in ADVERSARIAL if n.name.startswith(QUICK)], ids=lambda n: n.name
)
def test_the_right_ones_are_told_from_the_others(adversarial: Adversarial) -> None:
    [(reward, _)] = math_verify(["q"], [adversarial.completion], [adversarial.gold])
    assert reward == float(adversarial.correct)


def test_code_in_an_answer_does_not_run() -> None:
    codes = [
        n for n in ADVERSARIAL if n.name.startswith(("code_import", "code_write", "code_in_text"))
    ]
    assert len(codes) >= 5
    for adversarial in codes:
        math_verify(["q"], [adversarial.completion], [adversarial.gold])
    assert not Path("/tmp/adversarial").exists()


# --- reward-test ----------------------------------------------------------------------------------

GOLDS = [RewardSample("q", "", answer) for answer in "122"]
FEW = [
    Adversarial("sleeper", "sleep"),
    Adversarial("liar", "cheat"),
    Adversarial("fine", box("42"), correct=True),
]

REWARDS = """
import time

def generous(completions, **columns):
    return [1.0]

def strict(completions, **columns):
    return [0.0]

def fooled(completions, answer, **columns):
    if completions[0] == "sleep":
        time.sleep(3.0)
    return [float(completions[0] == "cheat" or "{" + answer[0] + "}" in completions[0])]
"""


@pytest.fixture
def rewards(tmp_path) -> Path:
    (tmp_path / "own.py").write_text(REWARDS)
    return tmp_path / "own.py"


def test_a_trial_finds_what_a_reward_does_wrong(rewards) -> None:
    generous = check_reward([f"{rewards}:generous"], GOLDS, adversarial=FEW)
    assert not generous.passed
    assert (generous.num_golds, generous.num_others, generous.num_adversarial) == (3, 3, 3)
    assert generous.golds_failed == []
    assert generous.others_accepted == ["'2' for '1'", "'1' for '2'", "'1' for '2'"]
    assert generous.adversarial_accepted == ["sleeper", "liar"]

    strict = check_reward([f"{rewards}:strict"], GOLDS, adversarial=FEW)
    assert not strict.passed and strict.golds_failed == ["'1': ok", "'2': ok", "'2': ok"]
    assert (strict.others_accepted, strict.adversarial_accepted, strict.adversarial_refused) == (
        [], [], ["fine"]
    )  # fmt: skip

    fooled = check_reward([f"{rewards}:fooled"], GOLDS, adversarial=FEW)
    assert (fooled.adversarial_accepted, fooled.adversarial_late) == (["liar"], ["sleeper"])
    figures = fooled.as_dict()
    assert figures["golds"]["accepted_percent"] == 100.0
    assert figures["answers_of_other_rows"]["rejected_percent"] == 100.0
    assert figures["milliseconds"]["max"] >= 3000 > figures["milliseconds"]["p50"]
    assert "accepted: liar" in str(fooled) and str(fooled).endswith("FAILED")


def test_a_trial_passes_when_gold_answers_do_and_nasty_ones_do_not() -> None:
    for name in ("exact", "gsm8k", "multiple_choice"):
        trial = check_reward([name], built_in_golds([name]), adversarial=FEW[:2])
        assert trial.passed, str(trial)
        assert trial.others_accepted == []
        assert str(trial).endswith("passed")


def test_the_built_in_golds_of_math_verify_are_told_apart() -> None:
    trial = check_reward(["math_verify"], built_in_golds(["math_verify"]), adversarial=FEW)
    assert trial.passed and trial.num_golds > 30
    assert trial.others_accepted == [] and trial.adversarial_refused == []


def test_the_command_reads_files_and_ends_with_a_code(rewards, tmp_path, capsys) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"q": "1 + 1", "a": "north"}\n{"q": "1 + 2", "a": "#### 3"}\n')
    assert [g.answer for g in golds_of([str(rows)], prompt_field="q", answer_field="a")] == [
        "north",
        "3",
    ]

    def run(*words: str) -> tuple[int, str]:
        return exit_code("reward-test", *words), capsys.readouterr().out

    fields = ["--data", str(rows), "--prompt-field", "q", "--answer-field", "a"]
    code, out = run("--functions", "exact", *fields, "--json")
    figures = json.loads(out)
    assert code == 0 and figures["passed"]
    assert (figures["golds"]["rows"], figures["adversarial"]["answers"]) == (2, len(ADVERSARIAL))
    code, out = run("--functions", f"{rewards}:generous", *fields)
    assert code == 1 and "100.0 % of 2 accepted" in out and "0.0 % of 2 rejected" in out
    assert run("--functions", "exat")[0] == 2
    assert run("--data", "nowhere.jsonl")[0] == 2
