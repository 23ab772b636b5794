"""`exgrpo-fast reward-test`: does a reward accept gold answers and refuse wrong and hostile ones?"""

from __future__ import annotations

import argparse
import json
from typing import Any

from exgrpo_fast.cli.arguments import add_command, add_fields, require_file, require_rewards
from exgrpo_fast.cli.output import print_lines
from exgrpo_fast.rewards.selftest.check_reward import built_in_golds, check_reward, golds_of


def add_reward_test(commands: Any) -> None:
    text = "what a reward gives to gold answers, wrong ones and adversarial ones"
    c = add_command(commands, "reward-test", reward_test, text)
    c.add_argument("--functions", default="math_verify", help="comma separated (math_verify)")
    c.add_argument("--data", nargs="+", default=[], help="gold answers; default: a built-in list")
    add_fields(c)
    c.add_argument("--json", action="store_true", help="the same as JSON")


def reward_test(arguments: argparse.Namespace) -> int:
    """Exit code 1 where the reward fails."""
    functions = arguments.functions.split(",")
    require_rewards(functions, "--functions")
    for path in arguments.data:
        require_file(path, "--data")
    fields = {"prompt_field": arguments.prompt_field, "answer_field": arguments.answer_field}
    golds = golds_of(arguments.data, **fields) or built_in_golds(functions)
    trial = check_reward(functions, golds)
    if arguments.json:
        print(json.dumps(trial.as_dict(), indent=2))
    else:
        print_lines(str(trial), indent=" " * 18)
    return 0 if trial.passed else 1
