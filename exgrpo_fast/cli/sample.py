"""`exgrpo-fast sample`: completions of one question, with reward, length and mean log-prob."""

from __future__ import annotations

import argparse
from typing import Any

from exgrpo_fast.cli.arguments import add_command, natural, positive, require_file
from exgrpo_fast.cli.eval import add_model_options, evaluated_model
from exgrpo_fast.config import ConfigError
from exgrpo_fast.core.text import clean_text


def add_sample(commands: Any) -> None:
    c = add_command(commands, "sample", sample, "look at completions with their rewards")
    c.add_argument("--data", metavar="FILE", help="take the question from this file")
    c.add_argument("--row", type=natural, default=0, help="which question of it (0)")
    c.add_argument("--prompt", metavar="TEXT", help="or ask this")
    c.add_argument("-n", dest="eval.n", type=positive, default=4, help="completions (4)")
    add_model_options(c)
    c.set_defaults(**{"eval.k": [1]})


def sample(arguments: argparse.Namespace) -> int:
    if arguments.data and arguments.prompt:
        raise ConfigError("sample: give --prompt or --data, not both")
    if arguments.data:
        require_file(arguments.data, "--data")
    elif not (arguments.prompt or "").strip():
        raise ConfigError("sample: give --prompt TEXT or --data FILE [--row I]")
    if arguments.data:
        model = evaluated_model(arguments, [arguments.data])
        questions, row = model.read(arguments.data), arguments.row
        if row >= len(questions):
            raise ConfigError(
                f"--row {row}: {arguments.data} has questions 0 to {len(questions) - 1}"
            )
        question = questions[row]
    else:
        model = evaluated_model(arguments, [], prompt=arguments.prompt)
        question = model.question(arguments.prompt)
    with model.evaluator(question) as evaluator:
        samples = evaluator.sample([question])
    print(clean_text(f"question  {question.prompt}\nanswer    {question.answer or '(none given)'}"))
    for sample in samples:
        completion, verdict = sample.completion, sample.verdict
        reward = f"reward {verdict.reward:g} ({verdict.reason})"
        figures = (
            f"{len(completion.token_ids)} tokens, mean log-prob {completion.logprobs.mean():.3f}"
        )
        print(f"\n--- {reward if question.answer else 'no answer to compare with'}, {figures}")
        print(clean_text(sample.text))
    return 0
