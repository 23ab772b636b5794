"""`exgrpo-fast diagnose`: each check on series that show its fault, and logs of other trainers.

`trl_healthy.json` and `trl_zero.json` are the log history of GRPOTrainer (TRL 1.16.0, a random
model of two layers): 20 steps with a reward that some completions earn, 12 with one that is
always 0. tests/with_verl writes verl's log with its own logger.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import exit_code

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.run.diagnosis.checks import diagnose, since
from exgrpo_fast.run.diagnosis.logs import Log, read_log
from exgrpo_fast.training.batch import UpdateBatch
from exgrpo_fast.training.update_stats import UpdateReport
from exgrpo_kernels import PolicyObjective

HERE = Path(__file__).parent


def log(**series: list[float]) -> Log:
    """Series that begin at step 1; a reward that rises unless one is given."""
    series.setdefault("reward", [0.2 + 0.03 * i for i in range(20)])
    points = {name: list(enumerate(values, 1)) for name, values in series.items()}
    return Log("exgrpo-fast", points)


def found(run: Log) -> dict[str, tuple[bool, int | None]]:
    return {f.check: (f.is_wrong, f.since_step) for f in diagnose(run)}


def test_a_good_run_has_no_findings() -> None:
    good = log(
        zero_variance=[0.3] * 20,
        entropy=[0.5 - 0.01 * i for i in range(20)],
        clip_frac=[0.02] * 20,
        kl_ref=[0.01] * 20,
        mismatch=[0.001] * 20,
        truncated=[0.05] * 20,
        length=[100.0 + i for i in range(20)],
        grad_norm=[0.5] * 20,
        lr=[1e-6] * 20,
        reward_errors=[0.0] * 20,
        skipped_updates=[0.0] * 20,
    )
    assert found(good) == {}


def test_groups_without_gradient_are_a_fault_where_nothing_is_correct() -> None:
    shares = [0.4] * 8 + [0.95] * 12
    hard = log(zero_variance=shares, all_fail=shares, all_pass=[0.0] * 20, reward=[0.05, 0.04] * 10)
    # the mean of 5 values passes 0.7 with the third of 0.95
    assert found(hard)["zero-variance groups"] == (True, 11)
    easy = log(zero_variance=shares, all_fail=[0.0] * 20, all_pass=shares)
    assert found(easy)["zero-variance groups"] == (False, 11)
    text = diagnose(hard)[0].line()
    assert "95% of groups carry no gradient: reward" in text and "recipe eapo" in text


@pytest.mark.parametrize(
    ("signal", "values", "check", "key"),
    [
        ("truncated", [0.0] * 10 + [0.6] * 10, "truncation", "rollout.max_completion_tokens"),
        ("mismatch", [0.001] * 10 + [0.1] * 10, "engine mismatch", "rollout.mismatch"),
        ("clip_frac", [0.01] * 10 + [0.5] * 10, "ratio and KL drift", "train.lr"),
        ("kl_ref", [0.01] * 10 + [2.0] * 10, "ratio and KL drift", "algorithm.kl.coef"),
        ("reward_errors", [0.0] * 10 + [0.5] * 10, "reward faults", "reward.functions"),
        ("entropy", [0.5] * 10 + [3.0] * 10, "entropy growth", "train.lr"),
        ("grad_norm", [0.1] * 10 + [9.0] * 10, "gradient norm", "train.max_grad_norm"),
    ],
)
def test_each_signal_is_found_with_its_step_and_key(
    signal: str, values: list[float], check: str, key: str
) -> None:
    run = log(**{signal: values})
    (finding,) = diagnose(run)
    assert finding.check == check and finding.is_wrong and key in finding.key
    assert finding.since_step is not None and 11 <= finding.since_step <= 15
    assert found(log(**{signal: values[:10] * 2})) == {}


def test_entropy_collapse_is_a_fault_only_where_the_reward_stands_still() -> None:
    values = [1.0] * 5 + [0.05] * 15
    assert found(log(entropy=values)) == {"entropy collapse": (False, 10)}
    assert found(log(entropy=values, reward=[0.5, 0.51] * 10)) == {"entropy collapse": (True, 10)}


def test_length_that_doubles_without_reward_is_a_fault() -> None:
    lengths = [100.0] * 8 + [300.0] * 12
    assert "length growth" in found(log(length=lengths, reward=[0.5, 0.51] * 10))
    assert found(log(length=lengths)) == {}


def test_a_reward_that_falls_names_its_best_step() -> None:
    run = log(reward=[0.1 * i for i in range(10)] + [0.2] * 10)
    assert found(run)["reward fell"] == (True, 10)


def test_a_constant_reward_and_a_learning_rate_of_zero() -> None:
    run = log(reward=[0.0] * 8, lr=[0.0] * 8)
    assert found(run) == {"reward faults": (True, 1), "learning rate": (True, 1)}


def test_steps_without_an_update_have_no_learning_rate(tmp_path: Path) -> None:
    report = UpdateReport()
    report.refuse("update_without_gradient", UpdateBatch([], PolicyObjective()), None)
    step = {"reward_mean": 0.0, "lr": report.lr, "skipped": 1}
    lines = [json.dumps(step | {"step": i}) for i in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert found(read_log(tmp_path)).keys() == {"reward faults", "updates"}


def test_since_is_the_last_unbroken_stretch() -> None:
    series = list(enumerate([9.0] * 6 + [0.0] * 9 + [9.0] * 6, 1))
    assert since(series, lambda value: value > 5) == 18  # 3 of 5 values are 9
    assert since(series[:12], lambda value: value > 5) is None


# ---- logs ----------------------------------------------------------------------------------------


def test_trl_logs_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "output" / "checkpoint-12"
    folder.mkdir(parents=True)
    shutil.copy(HERE / "trl_zero.json", folder / "trainer_state.json")
    run = read_log(tmp_path / "output")
    assert (run.trainer, run.num_steps) == ("TRL", 12)
    assert {"reward faults", "zero-variance groups", "truncation"} <= found(run).keys()
    shutil.copy(HERE / "trl_healthy.json", folder / "trainer_state.json")
    run = read_log(folder / "trainer_state.json")
    assert run.num_steps == 20
    assert "zero-variance groups" not in found(run)
    assert all(
        len(run.series[name]) == 20 for name in ("reward", "entropy", "length", "lr", "kl_ref")
    )


def test_our_run_directory_is_read(tmp_path: Path) -> None:
    steps = [
        {
            "step": i,
            "reward_mean": 0.0,
            "learnable_frac": 0.0,
            "all_fail_frac": 1.0,
            "all_pass_frac": 0.0,
            "reasons": {"error: KeyError": 3, "wrong": 1},
        }
        for i in range(1, 9)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    run = read_log(tmp_path)
    assert run.trainer == "exgrpo-fast"
    assert run.values("zero_variance") == [1.0] * 8
    assert run.values("reward_errors") == [0.75] * 8
    assert found(run).keys() == {"reward faults", "zero-variance groups"}


def test_the_command_exits_1_and_prints_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"step": i, "data": {"critic/score/mean": 0.1 * i}} for i in range(1, 9)]
    path = tmp_path / "verl.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert exit_code("diagnose", path) == 0
    assert capsys.readouterr().out == "verl, 8 steps\nnothing to report\n"
    lines = [line | {"data": line["data"] | {"response_length/clip_ratio": 0.9}} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert exit_code("diagnose", "--json", path) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["findings"][0]["key"] == "data.max_response_length"


@pytest.mark.parametrize("name", ["missing", "."])
def test_nothing_to_read_is_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^diagnose: "):
        read_log(tmp_path / name)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"log_history": 3}', '{"log_history": [1]}'])
def test_a_damaged_trainer_state_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(UserError):
        read_log(tmp_path)
