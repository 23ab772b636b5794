"""The command line through its own `main`: every mistake in one line, and whole tiny runs."""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import REWARDS, Result, exit_code

from exgrpo_fast import __version__
from exgrpo_fast.cli import parser
from exgrpo_fast.cli.arguments import lacks_cuda
from exgrpo_fast.cli.eval import model_config
from exgrpo_fast.config import all_keys
from exgrpo_fast.core.http_client import refuse_unreachable
from exgrpo_fast.run.checkpoint.manifest import verify
from exgrpo_fast.run.directory import RunFolder
from exgrpo_fast.training.collector import Collector
from exgrpo_fast.training.learner import Learner

ROOT = Path(__file__).resolve().parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"  # a copy beside the repository


# --- mistakes -------------------------------------------------------------------------------------

SERVED = "train quickstart --rollout.engine vllm_server --rollout.server.urls"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("trian quickstart", "invalid choice: 'trian'"),
        ("trian quickstart", "did you mean 'train'?"),
        ("train", "train: the following arguments are required: CONFIG"),
        ("train quikstart", "unknown recipe 'quikstart'; did you mean 'quickstart'?"),
        ("train nowhere.yaml", "config file nowhere.yaml: No such file or directory"),
        ("train quickstart --train.lrr 1", "unknown key 'train.lrr'; did you mean 'train.lr'?"),
        ("train quickstart --trian.lr 1", "unknown key 'trian'; did you mean 'train'?"),
        ("train quickstart --lr 1", "unknown option '--lr'; did you mean '--train.lr'?"),
        ("train quickstart --learning-rate 1", "'--learning-rate'; here it is '--train.lr'"),
        ("train quickstart --rollout.n 8", "'rollout.n'; here it is 'rollout.group_size'"),
        ("train quickstart --dryrun", "unknown option '--dryrun'; did you mean '--dry-run'?"),
        ("train quickstart --train.lr fast", "train.lr: input should be a valid number"),
        ("train quickstart --train.lr", "--train.lr needs a value"),
        ("train quickstart --train.lr --dry-run", "--train.lr needs a value"),
        ("train quickstart --train.lr [", "--train.lr: while parsing a flow node"),
        ("train quickstart more", "'more' is neither an option nor the value of one"),
        ("train quickstart --max-steps 0", "--max-steps: 0 is not a positive number"),
        ("train quickstart --resume last", "--resume: last is neither auto, never nor a step"),
        ("train quickstart --train.minibatches 3", "cannot be split into train.minibatches (3)"),
        ("train grpo", "model.name is not set"),
        ("train grpo --model.name a/b", "data.train is not set"),
        ("train quickstart --model.name ./modle", "model.name: ./modle does not exist"),
        ("train grpo --data.train good.jsonl --model.name ./rows.jsonl", "rows.jsonl is a file;"),
        ("train grpo --data.train good.jsonl --model.name a_run", "checkpoints/step_N/hf"),
        ("train grpo --data.train good.jsonl --model.name adapter", "merge it into its model"),
        (
            "train grpo --data.train good.jsonl --model.name empty",
            "empty/config.json does not exist",
        ),
        (
            "train grpo --data.train good.jsonl --model.name mute",
            "model.name mute: no tokenizer: the folder has no tokenizer.json",
        ),
        ("eval --model mute --data good.jsonl", "--model mute: no tokenizer"),
        ("sample --model mute --prompt hello", "--model mute: no tokenizer"),
        ("train quickstart --data.train rows.jsonl", "no field 'prompt', 'problem', 'question'"),
        (
            "train quickstart --data.train bad.jsonl",
            "none of the first 2 rows is usable: bad.jsonl:1",
        ),
        ("train quickstart --data.eval none.jsonl", "data none.jsonl: no rows"),
        ("train quickstart --rollout.engine vllm", "rollout.engine vllm: vLLM is not installed"),
        (f"{SERVED} [http://host:8100]", "no key in the environment variable EXGRPO_FAST_KEY"),
        (f"{SERVED} [host]", "rollout.server: the base URL has to look like https://host/v1"),
        ("train quickstart --data.train row.jsonl", "did you mean rows.jsonl?"),
        ("train quickstart --data.eval no.parquet", "data.eval: no.parquet does not exist"),
        (
            "train quickstart --reward.functions [reasoning_gm]",
            "reward.functions: unknown reward 'reasoning_gm'; did you mean 'reasoning_gym'?",
        ),
        ("train quickstart --reward.functions [./no.py:f]", "reward.functions: reward './no.py:f'"),
        ("train quickstart --out rows.jsonl", "--out rows.jsonl: File exists"),
        ("eval --model m", "eval: the following arguments are required: --data"),
        ("eval --model m --data no.jsonl", "--data: no.jsonl does not exist"),
        ("eval --model m --data rows.jsonl -k 16", "-k 16 needs as many samples: -n is 8"),
        ("eval --model m --data rows.jsonl -k one", "-k: one is not a positive number"),
        ("eval --model m --data rows.jsonl --reward exat", "--reward: unknown reward 'exat'"),
        ("eval --model m --data rows.jsonl --sed 1", "unknown argument '--sed'; did you mean"),
        ("eval --model ./m --data rows.jsonl", "--model: ./m does not exist"),
        ("sample --model m", "sample: give --prompt TEXT or --data FILE"),
        (
            "sample --model m --prompt p --data rows.jsonl",
            "sample: give --prompt or --data, not both",
        ),
        ("init there --recipe grop", "did you mean 'grpo'?"),
        ("init rows.jsonl", "init rows.jsonl: File exists"),
        ("score --in no.jsonl --out o", "--in: no.jsonl does not exist"),
        ("score --in rows.jsonl --out no/o", "--out no/o: No such file or directory"),
        ("score --in rows.jsonl --out o --functions f", "--functions: unknown reward 'f'"),
        ("check-data rows.json", "check-data: rows.json does not exist; did you mean rows.jsonl?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(refused, tmp_path: Path, words: str, said: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"gold": "1", "completion": "1"}\n')
    (tmp_path / "good.jsonl").write_text('{"prompt": "1 + 1", "answer": "2"}\n')
    (tmp_path / "bad.jsonl").write_text('{"prompt": "1 + 1"\n{"prompt": "", "answer": ""}\n')
    (tmp_path / "none.jsonl").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a_run" / "checkpoints").mkdir(parents=True)
    for folder, file in (("mute", "config.json"), ("adapter", "adapter_config.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    assert said in refused(*words.split())


def test_rollout_servers_that_are_not_there_are_a_mistake(refused, monkeypatch) -> None:
    """Before the first start alone: a run that goes on waits for them."""
    monkeypatch.setenv("EXGRPO_FAST_KEY", "key")
    words = SERVED.split()
    gone = "http://127.0.0.1:9 takes no connection (Connection refused)"  # port 9 discards
    assert refused(*words, "[http://127.0.0.1:9]") == f"rollout.server: {gone}"
    said = refused(*words, "[http://127.0.0.1:9,http://127.0.0.1:9]")
    assert said == f"rollout.server: none of 2: {gone}"
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = f"http://127.0.0.1:{server.getsockname()[1]}"
        refuse_unreachable(["http://127.0.0.1:9", here])


def test_a_logger_that_is_not_installed_is_a_mistake(refused, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    said = refused("train", "quickstart", "--log.to", "[wandb]")
    assert said == "log.to: wandb is not installed: pip install wandb"


def test_mistakes_are_found_before_torch_is_imported(tmp_path: Path) -> None:
    """In under 3 seconds; the time itself depends on the machine, the import does not."""
    script = """
import sys
from exgrpo_fast.cli import main, parser
from exgrpo_fast.cli.eval import model_config
from exgrpo_fast.config import all_keys
for words in ("train quickstart --train.lrr 1", "train quikstart", "train quickstart --train.lr x",
              "train quickstart --reward.functions [exat]", "train grpo", "trian",
              "train quickstart --data.train no.jsonl", "train quickstart --train.minibatches 3",
              "eval --model m --data no.jsonl", "sample --model m", "buffer stats nowhere",
              "train quickstart --data.train bad.jsonl", "train quickstart --rollout.engine vllm",
              "train grpo --data.train good.jsonl --model.name empty",
              "train grpo --data.train good.jsonl --model.name mute",
              "eval --model mute --data good.jsonl", "sample --model mute --prompt hello",
              "train quickstart --dry-run", "init new", "--help"):
    try:
        main(words.split())
    except SystemExit as ended:
        heavy = {"torch", "transformers", "reasoning_gym"} & sys.modules.keys()
        print(words, ended.code, *heavy, file=sys.stderr)
"""
    (tmp_path / "bad.jsonl").write_text('{"prompt": 1\n')
    (tmp_path / "good.jsonl").write_text('{"prompt": "1 + 1", "answer": "2"}\n')
    (tmp_path / "empty").mkdir()
    (tmp_path / "mute").mkdir()
    (tmp_path / "mute" / "config.json").write_text("{}")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    codes = [line for line in done.stderr.splitlines() if not line.startswith("exgrpo-fast: ")]
    assert len(codes) == 20, done.stderr
    assert all(line.endswith(" 2") for line in codes[:-3])
    assert codes[-3:] == ["train quickstart --dry-run 0", "init new 0", "--help 0"]


@pytest.mark.parametrize("command", ["eval", "sample"])
def test_options_of_eval_and_sample_are_config_keys(command: str) -> None:
    data = ["--data", "rows.jsonl"]
    arguments = vars(parser().parse_args([command, "--model", "m", "--temperature", "0", *data]))
    dotted = {name for name in arguments if "." in name}
    assert {"model.name", "reward.functions", "eval.n", "rollout.engine"} <= dotted
    assert dotted <= set(all_keys())
    config = model_config(argparse.Namespace(**arguments))
    assert (config.model.name, config.eval.temperature, config.eval.top_p) == ("m", 0.0, 1.0)
    assert (config.eval.n, config.eval.k) == {"eval": (8, [1, 8]), "sample": (4, [1])}[command]


# --- commands that need no model ------------------------------------------------------------------


def test_version_and_help(run) -> None:
    assert run("--version").out == f"exgrpo-fast {__version__}\n"
    shown = run("train", "--help")
    assert shown.code == 0 and "--replay.enabled" not in shown.err
    assert "replay.enabled" in shown.out and "quickstart" in shown.out
    shown = run("eval", "--help").out
    assert "-n N " in shown and "--temperature TEMPERATURE" in shown and "EVAL." not in shown


def test_every_option_is_explained_and_fits_sixty_columns(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    waiting: list[tuple[str, argparse.ArgumentParser]] = [("", parser())]
    while waiting:
        name, command = waiting.pop()
        assert all(len(line) <= 60 for line in command.format_help().splitlines()), name
        for action in command._actions:
            if isinstance(action, argparse._SubParsersAction):
                waiting += [(f"{name} {word}", made) for word, made in action.choices.items()]
            else:
                assert action.help, (name, action.option_strings or action.dest)


def test_dry_run_shows_what_would_be_trained(run, tmp_path: Path) -> None:
    shown = run("train", "quickstart", "--dry-run", "--max-steps", 7, "--train.lr=3e-5")
    tree = yaml.safe_load(shown.out)
    assert (shown.code, tree["train"]["max_steps"], tree["train"]["lr"]) == (0, 7, 3e-5)
    assert tree["model"]["name"] == "quickstart"
    assert "# a step: 64 questions x 8 = 512 completions" in shown.out
    assert list(tmp_path.iterdir()) == []


DRY = "train quickstart --dry-run"


@pytest.mark.parametrize(
    ("words", "unbuffered"), [(DRY, ""), (DRY, "1"), ("--help", ""), ("--version", "")]
)
def test_a_reader_that_has_seen_enough_is_no_error(
    tmp_path: Path, words: str, unbuffered: str
) -> None:
    """`exgrpo-fast train quickstart --dry-run | head -1`, whenever Python writes it out."""
    command = [sys.executable, "-m", "exgrpo_fast", *words.split()]
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    environment |= {"PYTHONUNBUFFERED": unbuffered}
    ended = subprocess.run(
        command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment
    )
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.parametrize("recipe", ["exgrpo", "dapo", "quickstart-eapo", "smollm2"])
def test_init_writes_a_project_that_validates(run, refused, tmp_path: Path, recipe: str) -> None:
    written = run("init", "new", "--recipe", recipe)
    names = ["config.yaml", "reward.py", "train.jsonl"]
    *paths, following = written.out.splitlines()
    assert (written.code, paths) == (0, [f"new/{name}" for name in names])
    assert following == "next: exgrpo-fast train new/config.yaml --dry-run"
    assert run("train", "new/config.yaml", "--dry-run").code == 0
    checked = run("check-data", "new/train.jsonl")
    assert (checked.code, checked.out) == (0, "3 good rows, 0 bad ones\n")
    assert "config.yaml, reward.py, train.jsonl is there already" in refused("init", "new")


def test_the_reward_that_init_writes_works_as_it_says(run, tmp_path: Path) -> None:
    run("init", "new")
    rows = [{"gold": "1", "completion": text} for text in ("short", "x" * 501)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("score", "--in", "rows.jsonl", "--out", "o", "--functions", "new/reward.py:short")
    assert done.code == 0 and done.out.startswith("2 rows in ")
    assert [row["reward"] for row in read_lines(tmp_path / "o")] == [1.0, 0.0]


def test_score(run, tmp_path: Path) -> None:
    rows = ['{"gold": "42", "completion": "so \\\\boxed{42}"}', '{"gold": 7, "completion": "8"}']
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, "{", ""]))
    assert run("score", "--in", "rows.jsonl", "--out", "scored.jsonl").code == 0
    scored = read_lines(tmp_path / "scored.jsonl")
    assert [row["reward"] for row in scored] == [1.0, 0.0, 0.0]
    assert all({"reward", "reason", "ms"} <= row.keys() for row in scored)
    assert scored[2]["reason"] == "bad_row" and "rows.jsonl:3" in scored[2]["detail"]


def test_check_data_names_every_bad_row(run, tmp_path: Path) -> None:
    good = '{"prompt": "1 + 1?", "answer": "2"}'
    (tmp_path / "rows.jsonl").write_text(f'{good}\n{{"prompt": "x"}}\n{good[:-1]}\n')
    checked = run("check-data", "rows.jsonl")
    lines = checked.out.splitlines()
    assert checked.code == 1 and len(lines) == 3
    assert lines[0].startswith("rows.jsonl:2: ") and lines[1].startswith("rows.jsonl:3: ")
    assert lines[2] == "1 good rows, 2 bad ones"


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- whole runs -----------------------------------------------------------------------------------

TINY = """
    --warm_start.batches 2 --warm_start.batch_size 8 --warm_start.examples 100
    --data.train.size 40 --data.eval.size 6 --rollout.prompts_per_step 4 --rollout.group_size 4
    --rollout.max_completion_tokens 8 --eval.n 2 --eval.k [1,2] --reward.workers 1
    --replay.start_success_rate 0.0 --no-supervise
""".split()
EVEN = ["--reward.functions", f"[{REWARDS}:even_length]"]  # a random policy is right half the time


def train(out: Path, *words: object) -> int:
    return exit_code("train", "quickstart", "--out", out, *TINY, *EVEN, *words)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of 3 steps; tests read it and leave it alone."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert train(out, "--max-steps", 3, "--eval.every", 2) == 0
    return out


METRICS = {
    "step": int,
    "loss": float,
    "loss_hex": str,
    "reward_mean": float,
    "pass_at_1": float,
    "entropy": float,
    "learnable_frac": float,
    "replay_size": int,
    "replay_frac": float,
    "completion_len_mean": float,
    "tokens_generated": int,
    "tokens_trained": int,
    "step_seconds": float,
    "peak_memory_gib": float,
    "skipped": int,
    "reasons": dict,
}


def test_a_run_leaves_every_file(finished: Path) -> None:
    names = "config.yaml env.json metrics.jsonl run.log report.html summary.json .lock".split()
    for name in [*names, "completions", "checkpoints/step_3/hf/model.safetensors"]:
        assert (finished / name).exists(), name
    verify(finished / "checkpoints" / "step_3")
    assert yaml.safe_load((finished / "config.yaml").read_text())["train"]["max_steps"] == 3
    env = json.loads((finished / "env.json").read_text())
    assert (env["exgrpo_fast"], env["device"] in ("cpu", "cuda")) == (__version__, True)
    assert "</html>" in (finished / "report.html").read_text()


def test_metrics_keep_their_contract(finished: Path) -> None:
    rows = read_lines(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert {name: type(row[name]) for name in METRICS} == METRICS
        assert float.fromhex(row["loss_hex"]) == pytest.approx(row["loss"], rel=1e-6)
        assert 0.0 <= row["pass_at_1"] <= 1.0 and 0.0 <= row["learnable_frac"] <= 1.0
        assert row["reasons"]["ok"] == 16 and row["tokens_trained"] > 0
        assert row["tokens_generated"] == row["completion_len_mean"] * (16 - 4 * row["replay_frac"])
        assert row["peak_memory_gib"] > 0 and row["step_seconds"] > 0
    assert [row["replay_frac"] > 0 for row in rows] == [False, False, True]  # stored in step 2
    assert ["eval_avg_at_n" in row for row in rows] == [False, True, False]


def test_summary_keeps_its_contract(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["method"], summary["steps"]) == ("exgrpo", 3)
    assert summary["wall_seconds"] > 0 and summary["peak_memory_gib"] > 0
    for when in ("eval_before", "eval_after"):
        found = summary[when]
        assert (found["n"], found["questions"]) == (2, 6)
        assert found["pass_at_k"].keys() == {"1", "2"}
        assert found["avg_at_n"] == pytest.approx(found["pass_at_k"]["1"])


def test_completion_tables(finished: Path) -> None:
    tables = sorted((finished / "completions").glob("step_*.parquet"))
    assert len(tables) == 1
    rows = pq.read_table(tables[0]).to_pylist()
    assert len(rows) == 16 and {row["step"] for row in rows} == {1}
    assert all(row["reward"] == float(len(row["completion"]) % 2 == 0) for row in rows)


def test_a_second_run_into_the_same_folder_is_refused(refused, finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    said = refused("train", "quickstart", "--out", finished, *TINY)
    assert "holds a run already; take another folder, or --resume auto" in said
    said = refused("train", "quickstart", "--out", finished, *TINY, *EVEN, "--resume", 99)
    assert said.endswith("--resume 99: expected auto, never or one of the steps: 3")
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_folder_in_use_is_refused(refused, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "busy", resume=False)
    said = refused("train", "quickstart", "--out", "busy", *TINY, "--resume", "auto")
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    assert said == f"--out busy: another run is writing there ({owner})"
    folder.close()
    RunFolder(tmp_path / "busy", resume=False).close()


def train_until_sigterm(
    out: Path, monkeypatch: pytest.MonkeyPatch, owner: type, method: str
) -> None:
    """Three steps, with SIGTERM before the first call of the method."""
    original = getattr(owner, method)

    def stopped(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    monkeypatch.setattr(owner, method, stopped)
    assert train(out, "--max-steps", 3, "--eval.every", 2) == 128 + signal.SIGTERM
    monkeypatch.undo()


def test_a_run_stopped_before_its_first_step_resumes(
    run, tmp_path: Path, finished: Path, monkeypatch
) -> None:
    out = tmp_path / "early"
    train_until_sigterm(out, monkeypatch, Collector, "begin")
    assert json.loads((out / "summary.json").read_text())["steps"] == 0
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_0"]
    assert train(out, "--max-steps", 3, "--eval.every", 2, "--resume", "auto") == 0
    ours, theirs = (read_lines(folder / "metrics.jsonl") for folder in (out, finished))
    assert [row["loss_hex"] for row in ours] == [row["loss_hex"] for row in theirs]


def test_a_stopped_run_resumes_as_if_nothing_had_happened(
    run, tmp_path: Path, finished: Path, monkeypatch
) -> None:
    """SIGTERM in the first update, a step written behind the checkpoint, then --resume auto."""
    out = tmp_path / "stopped"
    train_until_sigterm(out, monkeypatch, Learner, "update")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 1 and summary["eval_before"] and not summary["eval_after"]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_1"]
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 9.9, "loss_hex": "lost"}\n{"step": 3, "lo')

    assert train(out, "--max-steps", 3, "--eval.every", 2, "--resume", "auto") == 0
    ours, theirs = (read_lines(folder / "metrics.jsonl") for folder in (out, finished))
    assert [row["step"] for row in ours] == [1, 2, 3]
    for name in ("loss_hex", "reward_mean", "entropy", "replay_frac", "tokens_trained"):
        assert [row[name] for row in ours] == [row[name] for row in theirs], name
    summaries = [json.loads((f / "summary.json").read_text()) for f in (out, finished)]
    assert summaries[0]["eval_after"] == summaries[1]["eval_after"]
    assert summaries[0]["eval_before"] == summaries[1]["eval_before"]


def test_resume_with_other_data_is_refused(refused, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    words = [*TINY, *EVEN, "--resume", "auto", "--data.train.seed", 5]
    said = refused("train", "quickstart", "--out", "copy", *words)
    assert "copy/config.yaml says data.train.seed 1, now 5. Only model.gradient" in said
    config = tmp_path / "copy" / "config.yaml"
    config.write_text(config.read_text().replace("    seed: 1\n", "    seed: 5\n"))
    said = refused("train", "quickstart", "--out", "copy", *words)
    assert said.startswith("--resume: the checkpoint knows ")
    assert "questions that the data no longer has, such as " in said


def test_refused_gradients_are_exit_70(run, tmp_path: Path) -> None:
    words = [*TINY, *EVEN, "--max-steps", 5, "--train.skip_grad_norm", 1e-9]
    result = run("train", "quickstart", "--out", "bad", *words)
    assert result.code == 70
    assert "stopped: step 3: update_gradient_too_large for 3 steps in a row" in result.out


def test_a_checkpoint_that_cannot_be_written_is_exit_74(run, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "checkpoints").write_text("in the way")
    result = run("train", "quickstart", "--out", "full", *TINY, *EVEN, "--max-steps", 1)
    assert result.code == 74
    assert "cannot save: checkpoint of step 1" in result.out


def test_a_misspelt_task_is_found_before_the_warm_start(refused, tmp_path: Path) -> None:
    words = [*TINY, "--data.eval.gym", "chain_summ"]
    assert "'chain_summ'; did you mean 'chain_sum'?" in refused("train", "quickstart", *words)
    words = [*TINY, "--data.train.options.min_terms", 9]
    assert "max_terms must be >= min_terms" in refused("train", "quickstart", "--out", "x", *words)
    assert not list(tmp_path.glob("**/*.safetensors"))


# --- looking at a checkpoint ----------------------------------------------------------------------


def test_verify_checkpoint(run, refused, finished: Path, tmp_path: Path) -> None:
    good = finished / "checkpoints" / "step_3"
    assert run("verify-checkpoint", good).code == 0
    bad = tmp_path / "step_3"
    shutil.copytree(good, bad)
    (bad / "hf" / "config.json").write_text("{}")
    result = run("verify-checkpoint", bad)
    assert result.code == 1 and str(bad / "hf" / "config.json") in result.out
    assert run("verify-checkpoint", tmp_path / "nowhere").code == 1
    assert "is a run; its checkpoints are in" in refused("verify-checkpoint", finished)


def test_eval_and_sample_read_a_checkpoint(run, refused, finished: Path, tmp_path: Path) -> None:
    rows = [{"problem": f"State {i} + 1", "answer": str(i + 1)} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ["--model", finished / "checkpoints" / "step_3" / "hf"]
    reward = ["--reward", f"{REWARDS}:even_length", "--max-completion-tokens", 6]
    ask = ["eval", *model, *reward, "--data", "rows.jsonl", "-n", 4, "-k", "1,4"]
    result = run(*ask)
    found = json.loads(result.out)["rows.jsonl"]
    assert (result.code, found["n"], found["questions"]) == (0, 4, 3)
    assert found["avg_at_n_low"] <= found["avg_at_n"] <= found["avg_at_n_high"]
    assert found["pass_at_k"]["1"] <= found["pass_at_k"]["4"]
    assert json.loads(run(*ask).out)["rows.jsonl"] == found  # the same seed
    shown = run("sample", *model, *reward, "--data", "rows.jsonl", "--row", 2, "-n", 3)
    assert shown.code == 0 and "State 2 + 1" in shown.out and shown.out.count("--- reward") == 3
    assert "--row 3: rows.jsonl has questions 0 to 2" in refused(
        "sample", *model, *reward, "--data", "rows.jsonl", "--row", 3
    )
    asked = run("sample", *model, *reward, "--prompt", "2 + 2?", "-n", 1)
    assert asked.code == 0 and "no answer to compare with" in asked.out
    assert "Be brief." not in asked.out
    for question in (["--prompt", "2 + 2?"], ["--data", "rows.jsonl"]):
        words = ["sample", *model, *reward, *question, "-n", 1, "--system-prompt", "Be brief."]
        assert "Be brief." in run(*words).out


# --- a file of one's own --------------------------------------------------------------------------


def gsm8k_like(count: int) -> list[dict]:
    return [
        {
            "question": f"Ann has {i} apples and buys {i + 3} more. How many has she now?",
            "answer": f"Ann has {i} + {i + 3} = <<{i}+{i + 3}={2 * i + 3}>>{2 * i + 3}.\n"
            f"#### {2 * i + 3}",
        }
        for i in range(count)
    ]


@pytest.fixture
def train_file(run, tmp_path: Path, model_folder: Path):
    """train_file(lines, ...) -> Result of two steps on a JSONL with the tiny model."""

    def call(lines: list[str], *words: object, recipe: str = "exgrpo") -> Result:
        (tmp_path / "train.jsonl").write_text("".join(line + "\n" for line in lines))
        settings = f"""
            --out run --model.name {model_folder} --data.train train.jsonl --data.prompt_field
            question --data.max_prompt_tokens 400 --rollout.prompts_per_step 4 --reward.workers 1
            --rollout.group_size 2 --rollout.max_completion_tokens 8 --train.max_steps 2
            --no-supervise
        """.split()
        return run("train", recipe, *settings, *words)

    return call


@pytest.mark.parametrize("replay", ["true", "false"])
def test_a_gsm8k_file_trains_with_and_without_replay(
    train_file, tmp_path: Path, replay: str
) -> None:
    lines = [json.dumps(row) for row in gsm8k_like(20)] + ['{"question": "?"}']
    skip = ["--data.max_bad_rows", 0.1]
    result = train_file(lines, "--replay.enabled", replay, *skip)
    assert result.code == 0
    assert "skipped train.jsonl:21: missing field 'answer'" in result.out
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert ("replay_active" in rows[0]) == (replay == "true")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["method"] == {"true": "exgrpo", "false": "dr_grpo"}[replay]
    assert (summary["eval_before"], summary["eval_after"]) == (None, None)


@pytest.mark.skipif(not GSM8K.exists(), reason="no copy of GSM8K beside the repository")
def test_gsm8k_itself_trains(train_file, tmp_path: Path) -> None:
    with GSM8K.open() as file:
        lines = [line.rstrip("\n") for line, _ in zip(file, range(40), strict=False)]
    assert train_file(lines).code == 0
    assert [row["step"] for row in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("recipe", ["grpo", "dapo"])
def test_the_other_recipes_train(train_file, tmp_path: Path, recipe: str) -> None:
    lines = [json.dumps(row) for row in gsm8k_like(20)]
    soft = ["--algorithm.overlong.soft_penalty_tokens", 4]
    result = train_file(lines, *EVEN, *soft, recipe=recipe)
    assert result.code == 0
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert any(row["tokens_trained"] > 0 for row in rows)
    assert all(("kl_ref" in row) == (recipe == "grpo") for row in rows if row["tokens_trained"])


def test_bad_data_is_refused_before_the_model_is_loaded(
    train_file, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("exgrpo_fast.build.models.load_model", lambda name: pytest.fail("loaded"))
    good = [json.dumps(row) for row in gsm8k_like(20)]
    broken = '{"question": "?", "answer": '
    golds = json.dumps({"question": "Half?", "answer": "#### \\frac{1"})
    for lines, words, said in [
        ([*good, broken], [], "the first: train.jsonl:21: truncated"),
        ([*good, golds], [], "1 of 21 gold answers fail their own reward"),
        (good, ["--data.prompt_field", "problem"], "did you mean data.prompt_field question?"),
        (good, ["--data.max_prompt_tokens", 2], "longer than data.max_prompt_tokens 2"),
    ]:
        result = train_file(lines, *words)
        assert result.code == 2 and result.err.count("\n") == 1
        assert said in result.err


# --- bench ----------------------------------------------------------------------------------------


def test_bench_lists_the_scripts_and_runs_one(run, refused) -> None:
    listed = run("bench").out.splitlines()
    names = {line.split()[0] for line in listed}
    assert {"loss", "rollout", "memory"} <= names and "figures" not in names
    assert all(len(line.split()) > 3 for line in listed)
    assert run("bench", "regress", "--help").code == 0
    assert run("bench", "regress").code == 2  # the script's own
    assert refused("bench", "los") == "bench: there is no 'los'; did you mean 'loss'?"


def test_without_the_repository_there_is_nothing_to_measure(
    refused, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("exgrpo_fast.__file__", str(tmp_path / "exgrpo_fast" / "__init__.py"))
    assert "run it from the repository" in refused("bench", "loss")


def test_a_base_install_says_which_extra_is_missing() -> None:
    code = "import sys; sys.modules['pydantic'] = None; import exgrpo_fast.__main__ as m; m.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "exgrpo-fast: pydantic is not installed: pip install 'exgrpo-fast[train]'\n"
    )


@pytest.mark.parametrize(("words", "k"), [("", [1, 8]), ("-n 2", [1, 2]), ("-n 4 -k 2", [2])])
def test_passes_of_eval_follow_its_samples(words: str, k: list[int]) -> None:
    arguments = parser().parse_args(["eval", "--model", "m", "--data", "d", *words.split()])
    assert model_config(arguments).eval.k == k


# --- a CUDA device, looked for without torch ------------------------------------------------------


class Driver:
    """libcuda.so.1, as far as it is asked."""

    def __init__(self, code: int, count: int) -> None:
        self.code, self.count = code, count

    def cuInit(self, flags: int) -> int:
        return self.code

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.count  # of a ctypes.byref
        return 0


@pytest.mark.parametrize(
    ("build", "driver", "lacks"),
    [
        ("cuda = None\nhip = None", Driver(0, 8), True),
        ("cuda: Optional[str] = '12.8'\nhip = None", Driver(0, 1), False),
        ("cuda: Optional[str] = '12.8'\nhip = None", Driver(0, 0), True),
        ("cuda: Optional[str] = '12.8'\nhip = None", Driver(100, 0), True),  # CUDA_ERROR_NO_DEVICE
        ("cuda: Optional[str] = '12.8'\nhip = None", None, True),
        ("cuda = None\nhip: Optional[str] = '7.1'", None, False),
        ("version = '9'", None, False),
    ],
)
def test_a_cuda_device_is_missed_without_loading_torch(
    build: str,
    driver: Driver | None,
    lacks: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(name: str) -> Driver:
        if driver is None:
            raise OSError(name)
        return driver

    assert lacks_cuda() != torch.cuda.is_available()  # torch, which is loaded, is asked itself
    (tmp_path / "__init__.py").touch()
    (tmp_path / "version.py").write_text(build)
    monkeypatch.delitem(sys.modules, "torch")
    found = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert lacks_cuda() == lacks
