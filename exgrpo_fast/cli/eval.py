"""`exgrpo-fast eval`: avg@n and pass@k of a model on held-out questions."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from exgrpo_fast.cli.arguments import (
    add_command,
    add_fields,
    check_before_torch,
    check_device,
    choose_device,
    first_rows,
    positive,
    positives,
    require_file,
    require_model,
    require_rewards,
    require_tokenizer,
    require_urls,
)
from exgrpo_fast.config import Config, ConfigError, from_dotted, require_engine, validate

if TYPE_CHECKING:
    from exgrpo_fast.build.evaluated_model import EvaluatedModel

MAX_PROMPT_TOKENS, COMPLETION_TOKENS = 4096, 2048


def add_eval(commands: Any) -> None:
    c = add_command(commands, "eval", evaluate, "avg@n and pass@k of a model on held-out questions")
    c.add_argument(
        "--data", required=True, nargs="+", metavar="FILE", help=".jsonl, .json or .parquet"
    )
    c.add_argument("-n", dest="eval.n", type=positive, default=8, help="samples per question (8)")
    c.add_argument(
        "-k",
        dest="eval.k",
        type=positives,
        help="pass@k, comma separated (1 and n)",
    )
    c.add_argument(
        "--revise",
        metavar="N",
        type=positive,
        default=0,
        help="rounds in which failed completions are revised (none)",
    )
    add_model_options(c)


def add_model_options(command: argparse.ArgumentParser) -> None:
    """Options of the model and its sampling; those that are config keys have the key as `dest`."""
    add = command.add_argument
    name = "a folder, such as RUN/checkpoints/step_N/hf"
    add("--model", dest="model.name", required=True, help=name)
    add(
        "--reward",
        dest="reward.functions",
        type=lambda name: [name],
        default=["math_verify"],
        help="reward function (math_verify)",
    )
    add_fields(command, "data.")
    add(
        "--system-prompt",
        dest="data.system_prompt",
        metavar="TEXT",
        help="the run's data.system_prompt (none)",
    )
    add(
        "--max-completion-tokens",
        dest="rollout.max_completion_tokens",
        type=positive,
        metavar="N",
        help=f"({COMPLETION_TOKENS}, or what the model has positions for)",
    )
    add("--temperature", dest="eval.temperature", type=float, default=1.0, help="0 = greedy (1.0)")
    add("--top-p", dest="eval.top_p", type=float, default=1.0, help="nucleus (1.0)")
    add("--seed", dest="train.seed", type=int, default=0, help="of the draws (0)")
    add(
        "--allow-mismatch",
        dest="train.allow_mismatch",
        action="store_true",
        help="go on where the check of the forward pass fails",
    )
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    engines = ("auto", "transformers", "vllm")
    add(
        "--engine",
        dest="rollout.engine",
        metavar="ENGINE",
        choices=engines,
        default="auto",
        help=f"{', '.join(engines)} (auto)",
    )
    add("--endpoint", metavar="URL", help="a vLLM server generates: http://host/v1")
    add("--endpoint-model", metavar="NAME", help="its name there (the only one)")
    add("--endpoint-key-env", metavar="VARIABLE", help="holds its key (no key)")


def evaluate(arguments: argparse.Namespace) -> int:
    for path in arguments.data:
        require_file(path, "--data")
    model = evaluated_model(arguments, arguments.data)
    questions = {file: model.read(file) for file in arguments.data}
    first = next(iter(questions.values()))[0]
    with model.evaluator(first, revisions=arguments.revise) as evaluator:
        results = {file: evaluator(q).as_dict() for file, q in questions.items()}
    print(json.dumps(results, indent=2))
    return 0


def evaluated_model(
    arguments: argparse.Namespace, sources: Sequence[str], *, prompt: str | None = None
) -> EvaluatedModel:
    """The model of the options, without its weights; `sources` or `prompt`: what it is asked."""
    return open_model(
        model_config(arguments),
        sources,
        prompt=prompt,
        endpoint=endpoint_of(arguments),
        shortens=vars(arguments)["rollout.max_completion_tokens"] is None,
        device=arguments.device,
    )


def open_model(
    config: Config,
    sources: Sequence[str],
    *,
    prompt: str | None = None,
    endpoint: Mapping[str, Any] | None = None,
    shortens: bool = False,
    device: str | None = None,
    key: str = "--model",
) -> EvaluatedModel:
    """The same of a config. `sources`: files; `key`: what the user calls the model."""
    check_device(device, config)
    name, served = str(config.model.name), endpoint is not None
    if not served:  # beside a server the folder may hold a tokenizer alone
        require_model(name, key)
        require_engine(config)
    require_tokenizer(name, key)
    rewards = check_before_torch(
        config,
        first_rows(config, sources),
        prompt=prompt,
        tokenizer_only=endpoint is not None,
        shortens=shortens,
    )
    from exgrpo_fast.build.evaluated_model import EvaluatedModel

    return EvaluatedModel(
        config,
        device=choose_device(device),
        endpoint=endpoint,
        shorten=shortens,
        rewards=rewards,
    )


def model_config(arguments: argparse.Namespace) -> Config:
    """The config that evaluation and sampling need, from the options that are config keys."""
    values = {key: value for key, value in vars(arguments).items() if "." in key}
    if values["rollout.max_completion_tokens"] is None:
        values["rollout.max_completion_tokens"] = COMPLETION_TOKENS
    ks = values["eval.k"]
    if ks is None:
        del values["eval.k"]
    elif max(ks) > values["eval.n"]:
        raise ConfigError(f"-k {max(ks)} needs as many samples: -n is {values['eval.n']}")
    require_rewards(values["reward.functions"], "--reward")
    return with_limits(values)


def with_limits(values: dict[str, Any]) -> Config:
    """The config of dotted keys, with room for the longest sequence that can be read."""
    longest = MAX_PROMPT_TOKENS + values["rollout.max_completion_tokens"]
    limits = {"data.max_prompt_tokens": MAX_PROMPT_TOKENS}
    return validate(from_dotted(values | limits | {"train.max_tokens_per_microbatch": longest}))


def endpoint_of(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """url, model and key_env of a vLLM server that generates; None without --endpoint."""
    options = {"model": arguments.endpoint_model, "key_env": arguments.endpoint_key_env}
    if arguments.endpoint is not None:
        require_urls("--endpoint", [arguments.endpoint], arguments.endpoint_key_env, ask=True)
        return {"url": arguments.endpoint, **options}
    if any(options.values()):
        raise ConfigError(
            f"{arguments.command}: --endpoint-model and --endpoint-key-env need --endpoint"
        )
    return None
