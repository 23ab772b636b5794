"""`doctor`, `score`, `reward-test`, `check-data`, `verify-checkpoint`: look at one thing and say."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from exgrpo_fast.cli.inputs import require_file, require_rewards
from exgrpo_fast.cli.parsing import add_command
from exgrpo_fast.cli.train import add_memory, show_plan
from exgrpo_fast.config import ConfigError, load_config


def add_doctor(commands: Any) -> None:
    c = add_command(
        commands, "doctor", doctor, "what is installed, what works, what is missing for what"
    )
    c.add_argument("--model", help="a folder that vLLM is to run")
    c.add_argument("--json", action="store_true")
    c.add_argument("--config", help="show the memory plan of this config or recipe as well")
    add_memory(c)


def doctor(arguments: argparse.Namespace) -> int:
    from exgrpo_fast.build.doctor import collect, render

    config = load_config(arguments.config) if arguments.config else None
    if arguments.model:
        require_file(arguments.model, "--model")
    report = collect(model=Path(arguments.model) if arguments.model else None)
    print(json.dumps(report, indent=2) if arguments.json else render(report))
    if config is not None:
        return show_plan(config, None, arguments.device_memory_gib)
    return 0


def add_score(commands: Any) -> None:
    c = add_command(commands, "score", score, "rows {gold, completion} -> {reward, reason, ms}")
    c.add_argument("--in", dest="input", required=True)
    c.add_argument("--out", dest="output", required=True)
    c.add_argument("--functions", default="math_verify", help="comma separated (math_verify)")


def score(arguments: argparse.Namespace) -> int:
    require_file(arguments.input, "--in")
    functions = arguments.functions.split(",")
    require_rewards(functions, "--functions")
    from exgrpo_fast.rewards.score import score_file

    try:
        print(score_file(Path(arguments.input), Path(arguments.output), functions=functions))
    except OSError as error:
        raise ConfigError(f"--out {arguments.output}: {error.strerror}") from None
    return 0


def add_reward_test(commands: Any) -> None:
    text = "a reward against gold, wrong and nasty answers"
    c = add_command(commands, "reward-test", reward_test, text)
    c.add_argument("--functions", default="math_verify", help="comma separated (math_verify)")
    c.add_argument("--data", nargs="+", default=[], help="gold answers; default: a built-in list")
    c.add_argument("--prompt-field", default="prompt")
    c.add_argument("--answer-field", default="answer")
    c.add_argument("--json", action="store_true")


def reward_test(arguments: argparse.Namespace) -> int:
    functions = arguments.functions.split(",")
    require_rewards(functions, "--functions")
    for path in arguments.data:
        require_file(path, "--data")
    from exgrpo_fast.rewards.selftest.check_reward import built_in_golds, check_reward, golds_of

    fields = {"prompt_field": arguments.prompt_field, "answer_field": arguments.answer_field}
    golds = golds_of(arguments.data, **fields) or built_in_golds(functions)
    trial = check_reward(functions, golds)
    print(json.dumps(trial.as_dict(), indent=2) if arguments.json else trial)
    return 0 if trial.passed else 1


def add_check_data(commands: Any) -> None:
    text = "every bad row of a file, with line and reason"
    c = add_command(commands, "check-data", check_data, text)
    c.add_argument("file")
    c.add_argument("--prompt-field", default="prompt")
    c.add_argument("--answer-field", default="answer")


def check_data(arguments: argparse.Namespace) -> int:
    require_file(arguments.file, "check-data")
    from exgrpo_fast.data import check_data as check

    report = check(
        arguments.file, prompt_field=arguments.prompt_field, answer_field=arguments.answer_field
    )
    for row in report.bad_rows:
        print(f"{row.where}: {row.reason}")
    print(f"{report.num_good} good rows, {len(report.bad_rows)} bad ones")
    return 1 if report.bad_rows else 0


def add_verify_checkpoint(commands: Any) -> None:
    text = "exit 0 if whole, else 1 and the bad file"
    c = add_command(commands, "verify-checkpoint", verify_checkpoint, text)
    c.add_argument("folder")


def verify_checkpoint(arguments: argparse.Namespace) -> int:
    from exgrpo_fast.run.checkpoint.format import CheckpointError, verify

    try:
        verify(Path(arguments.folder))
    except CheckpointError as error:
        print(f"bad: {error}")
        return 1
    print(f"ok: {arguments.folder}")
    return 0
