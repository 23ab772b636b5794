"""`exgrpo-fast eval` and `exgrpo-fast sample`: a model answers questions."""

from __future__ import annotations

import argparse
import json
from typing import Any

from exgrpo_fast.cli.inputs import choose_device, require_file, require_rewards
from exgrpo_fast.cli.parsing import add_command, positive, positives
from exgrpo_fast.config import ConfigError


def add_eval(commands: Any) -> None:
    c = add_command(commands, "eval", evaluate, "avg@n and pass@k of a model on held-out questions")
    c.add_argument("--model", required=True, help="a folder, such as RUN/checkpoints/step_N/hf")
    c.add_argument("--data", required=True, nargs="+", help=".jsonl or .parquet files")
    c.add_argument("-n", type=positive, default=8, help="samples per question (8)")
    c.add_argument("-k", type=positives, default=[1, 8], help="pass@k, comma separated (1,8)")
    c.add_argument(
        "--revise", type=positive, default=0, help="rounds in which failed responses are revised"
    )
    add_sampling(c)


def add_sample(commands: Any) -> None:
    c = add_command(commands, "sample", sample, "look at completions with their rewards")
    c.add_argument("--model", required=True)
    c.add_argument("--data", help="take the question from this file")
    c.add_argument("--row", type=int, default=0, help="which question (0)")
    c.add_argument("--prompt", help="or ask this")
    c.add_argument("-n", type=positive, default=4)
    add_sampling(c)


def add_sampling(command: argparse.ArgumentParser) -> None:
    command.add_argument("--reward", default="math_verify", help="reward function (math_verify)")
    command.add_argument("--prompt-field", default="problem")
    command.add_argument("--answer-field", default="answer")
    command.add_argument("--max-completion-tokens", type=positive, default=2048)
    command.add_argument("--temperature", type=float, default=1.0, help="0 = greedy (1.0)")
    command.add_argument("--top-p", type=float, default=1.0)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", choices=["cpu", "cuda"])
    engines = ("auto", "transformers", "vllm")
    command.add_argument("--engine", choices=engines, default="auto", help="(auto)")
    command.add_argument(
        "--endpoint", metavar="URL", help="a vLLM server generates: http://host/v1"
    )
    command.add_argument("--endpoint-model", metavar="NAME", help="its name there (the only one)")
    command.add_argument("--endpoint-key-env", metavar="VARIABLE", help="holds its key (no key)")


def evaluate(arguments: argparse.Namespace) -> int:
    for path in arguments.data:
        require_file(path, "--data")
    if max(arguments.k) > arguments.n:
        raise ConfigError(f"-k {max(arguments.k)} needs as many samples: -n is {arguments.n}")
    require_rewards([arguments.reward], "--reward")
    from exgrpo_fast.cli.session import eval_session

    results = eval_session(
        arguments.model,
        arguments.data,
        n=arguments.n,
        ks=arguments.k,
        revise=arguments.revise,
        device=choose_device(arguments.device),
        endpoint=endpoint_arguments(arguments),
        **sampling_arguments(arguments),
    )
    print(json.dumps(results, indent=2))
    return 0


def sample(arguments: argparse.Namespace) -> int:
    if arguments.data:
        require_file(arguments.data, "--data")
    elif not arguments.prompt:
        raise ConfigError("sample: give --prompt TEXT or --data FILE [--row I]")
    require_rewards([arguments.reward], "--reward")
    from exgrpo_fast.cli.session import sample_session

    sample_session(
        arguments.model,
        data=arguments.data,
        row=arguments.row,
        prompt=arguments.prompt,
        n=arguments.n,
        device=choose_device(arguments.device),
        endpoint=endpoint_arguments(arguments),
        **sampling_arguments(arguments),
    )
    return 0


def sampling_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("reward", "prompt_field", "answer_field", "max_completion_tokens")
    names += ("temperature", "top_p", "seed", "engine")
    return {name: getattr(arguments, name) for name in names}


def endpoint_arguments(arguments: argparse.Namespace) -> dict[str, Any] | None:
    options = {"model": arguments.endpoint_model, "key_env": arguments.endpoint_key_env}
    if arguments.endpoint is not None:
        return {"url": arguments.endpoint, **options}
    if any(options.values()):
        raise ConfigError(
            f"{arguments.command}: --endpoint-model and --endpoint-key-env need --endpoint"
        )
    return None
