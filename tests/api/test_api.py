"""`from exgrpo_fast import train, evaluate`: a run from Python, in a script and in this process."""

from __future__ import annotations

import ast
import json
import linecache
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from several_processes import environment
from toy_runs import TORCHRUN, steps

import exgrpo_fast
from exgrpo_fast.api.inputs import as_references, as_source, make_config
from exgrpo_fast.config import Config, ConfigError
from exgrpo_fast.core.errors import UserError
from exgrpo_fast.rewards.loading import check_reference, load_function

ROWS = [{"prompt": f"{i} + 1?", "answer": "3"} for i in range(8)]
KEYS = {
    "prompts_per_step": 4,
    "group_size": 4,
    "max_completion_tokens": 8,
    "lr": 1e-3,
    "max_steps": 2,
    "check_answers": False,
    "rollout.engine": "transformers",
    "reward": {"workers": 1},
    "replay": {"start_success_rate": None},
    "data.prompt_field": "prompt",
    "checkpoint.every": 2,
}

SCRIPT = """
from exgrpo_fast import evaluate, train

BONUS = 1.0  # a global of the script, which the worker needs too


def even_length(completions, **columns):
    return [BONUS * (len(text) % 2 == 0) for text in completions]


rows = {rows}
keys = {keys}
reward_keys = keys.pop("reward")
run = train({model!r}, rows, even_length, out="run", **keys, **{{"reward.workers": 1}})
print("FINISHED", run.finished, len(run.metrics), run.checkpoint.name, run.report.exists())
result = evaluate(str(run.checkpoint), rows, even_length, n=2, max_completion_tokens=8)
print("AVG", result["avg_at_n"], result["questions"])
"""


def run_script(folder: Path, text: str, starter: Sequence[str] = (sys.executable,)) -> str:
    """What it prints."""
    (folder / "script.py").write_text(text)
    done = subprocess.run(
        [*starter, "script.py"],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_a_script_without_a_main_guard_trains_with_its_own_function(
    tmp_path: Path, model_folder: Path
) -> None:
    printed = run_script(tmp_path, SCRIPT.format(rows=ROWS, keys=KEYS, model=str(model_folder)))
    assert "FINISHED True 2 hf True" in printed
    assert printed.count("FINISHED") == 1, "a worker ran the script again"
    assert "AVG" in printed
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(0 < step["reward_mean"] < 1 for step in steps)


MISTAKES = """
import json, sys
from transformers import GenerationConfig, PreTrainedTokenizerFast
loaded_by_transformers = "torch" in sys.modules  # as 5.17 does
from exgrpo_fast import evaluate, train
from exgrpo_fast.core.errors import UserError

def raises(completions, **columns):
    raise KeyError("score")

rows, found = {rows}, []
model = {model!r}
keys = dict(out="run", max_completion_tokens=8)
for call in (
    lambda: train(model, rows, raises, **keys),
    lambda: train("broken", rows, **keys),
    lambda: train(model, "nowhere.jsonl", **keys),
    lambda: evaluate(model, rows, raises, max_completion_tokens=8),
    lambda: evaluate("broken", rows),
    lambda: evaluate("./nowhere", rows),
    lambda: evaluate(model, "nowhere.jsonl"),
    lambda: evaluate(model, rows, "nowhere.py:f"),
):
    try:
        call()
    except UserError as error:
        found.append(str(error))
print(json.dumps([found, "torch" in sys.modules and not loaded_by_transformers]))
"""


def test_mistakes_are_found_before_torch_is_loaded(tmp_path: Path, model_folder: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "broken")
    (tmp_path / "broken/chat_template.jinja").write_text("{% if %}")
    printed = run_script(tmp_path, MISTAKES.format(rows=ROWS, model=str(model_folder)))
    said, has_torch = json.loads(printed)
    expected = ("KeyError: 'score'", "line 1 of its chat template", "nowhere.jsonl does not exist")
    expected += (*expected[:2], "./nowhere does not exist", expected[2], "no file nowhere.py")
    assert len(said) == len(expected)
    assert all(part in line and "\n" not in line for part, line in zip(expected, said, strict=True))
    assert not has_torch


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"reward": 5}, "reward: 5 is neither a name nor a function"),
        ({"recipe": None}, "recipe: None is neither a recipe's name, a YAML file nor a Config"),
        ({"out": "file"}, "file/inputs/train.jsonl: Not a directory"),
    ],
)
def test_a_value_of_another_type_is_one_line(
    values: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(UserError) as caught:
        exgrpo_fast.train(
            "model", [{"prompt": "1 + 1?", "answer": "2"}], **{"reward": "exact"} | values
        )
    assert said in str(caught.value)


UNDER_TORCHRUN = """
from exgrpo_fast import train


def even_length(completions, **columns):
    return [float(len(text) % 2 == 0) for text in completions]


run = train({model!r}, {rows}, even_length, out="run", device="cpu", **{keys})
print(f"{{run.finished}} {{len(run.metrics)}} {{run.checkpoint.name}} {{run.report.exists()}}")
"""


def test_a_script_under_torchrun_is_the_run_of_one_process(
    tmp_path: Path, model_folder: Path
) -> None:
    """Every process calls `train`, and every one gets the finished run."""
    keys = {name: value for name, value in KEYS.items() if name != "reward"}
    keys |= {"reward.workers": 1}
    script = UNDER_TORCHRUN.format(model=str(model_folder), rows=ROWS, keys=keys)
    for count, starter in ((1, [sys.executable]), (2, TORCHRUN)):
        folder = tmp_path / str(count)
        folder.mkdir()
        printed = run_script(folder, script, starter)
        assert printed.count("True 2 hf True") == count, printed
    for ours, one in zip(*(steps(tmp_path / name / "run") for name in "21"), strict=True):
        assert math.isclose(ours["loss"], one["loss"], abs_tol=1e-6)
        assert ours["reward_mean"] == one["reward_mean"]


def test_stop_and_resume_in_this_process(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    keys: dict = KEYS | {"max_steps": 3, "checkpoint.every": 1}
    reward_keys = {"reward.workers": keys.pop("reward")["workers"]}
    reward = f"{Path(__file__).parents[1] / 'reward_functions.py'}:even_length"
    first = exgrpo_fast.train(
        str(model_folder), ROWS, reward, out="run", stop_after=1, **keys, **reward_keys
    )
    assert (first.finished, len(first.metrics)) == (False, 1)
    second = exgrpo_fast.train(
        str(model_folder), ROWS, reward, out="run", resume="auto", **keys, **reward_keys
    )
    assert second.finished
    assert [step["step"] for step in second.metrics] == [1, 2, 3]
    assert second.checkpoint is not None and (second.checkpoint / "config.json").exists()


def test_keywords_are_keys_by_their_last_word_or_sections() -> None:
    config = make_config("exgrpo", {"lr": 2e-6, "group_size": 5, "replay": {"enabled": False}})
    assert (config.train.lr, config.rollout.group_size, config.replay.enabled) == (2e-6, 5, False)
    again = make_config(config, {"rollout.group_size": 6})
    assert isinstance(again, Config) and again.rollout.group_size == 6
    assert again.train.lr == 2e-6


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"group_sise": 5}, "did you mean 'group_size'"),
        ({"num_generations": 8}, "here it is 'rollout.group_size'"),
        ({"lr": "fast"}, "train.lr"),
    ],
)
def test_a_mistake_is_one_line(keys: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_config("exgrpo", keys)


def test_the_run_of_the_page_about_trl_is_a_config() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/from-trl-and-verl.md").read_text()
    snippet = page.partition("from exgrpo_fast import train\n")[2].partition("```")[0]
    call = ast.parse(snippet).body[0].value  # pyright: ignore[reportAttributeAccessIssue]
    keys = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    config = make_config(keys.pop("recipe"), keys)
    assert (config.rollout.group_size, config.rollout.prompts_per_step) == (8, 16)
    assert (config.algorithm.aggregation, config.train.weight_decay) == ("token_mean", 0.0)


def test_rows_become_a_file(tmp_path: Path) -> None:
    file = tmp_path / "inputs" / "train.jsonl"
    assert as_source((row for row in ROWS), file) == str(file)
    assert [json.loads(line) for line in file.read_text().splitlines()] == ROWS
    assert as_source("name:split", file) == "name:split"
    with pytest.raises(ConfigError, match="rows are empty"):
        as_source([], file)
    with pytest.raises(ConfigError, match="plain values"):
        as_source([{"prompt": object()}], file)


def test_a_function_of_a_notebook_is_written_by_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "def half(completions, **_):\n    return [0.5] * len(completions)\n"
    names: dict = {"__name__": "__main__"}
    exec(compile(source, "<cell 1>", "exec"), names)
    lines = source.splitlines(keepends=True)
    monkeypatch.setitem(linecache.cache, "<cell 1>", (len(source), None, lines, "<cell 1>"))
    (reference,) = as_references(names["half"], tmp_path)
    assert reference == f"{(tmp_path / 'half.py').resolve()}:half"
    assert check_reference(reference) == reference
    assert load_function(reference)(completions=["a", "b"]) == [0.5, 0.5]
    assert as_references(["math_verify", names["half"]], tmp_path)[0] == "math_verify"
