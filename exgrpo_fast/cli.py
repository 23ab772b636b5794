"""`exgrpo-fast`: words to calls. Everything heavy is imported inside the command that needs it, so
that a user's mistake is answered in one line before torch is loaded.

Exit codes: 0 done, 2 usage or config, 70 numerical stop, 74 cannot save, 75 gave up after restarts,
130/143 signals.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from exgrpo_fast import __version__
from exgrpo_fast.config import (
    Config,
    ConfigError,
    all_keys,
    dump_yaml,
    keys_by_last_word,
    load_config,
    recipe_names,
    refuse_other_config,
    refuse_with_several,
    require,
)
from exgrpo_fast.errors import UserError
from exgrpo_fast.heartbeat import Supervised
from exgrpo_fast.metrics import clean_line
from exgrpo_fast.run_folder import GuestFolder, RunFolder
from exgrpo_fast.torchrun import place_of

EXIT_USAGE, EXIT_NUMERICAL, EXIT_CANNOT_SAVE, EXIT_SIGNAL = 2, 70, 74, 128
SORT_KEYS = ("bucket", "trajectories", "visits", "entropy", "age")  # of `buffer ls`


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code."""
    # OpenMP threads that spin while they wait slow a run down many times over as soon as anything
    # else uses the CPU. Read when torch is loaded, hence before it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        arguments, rest = parser().parse_known_args(argv)
        if rest and arguments.run is not train:
            hint = suggest(rest[0], arguments.options)
            raise ConfigError(f"{arguments.command}: unknown argument '{rest[0]}'{hint}")
        if arguments.run is train:
            arguments.words = list(sys.argv[1:] if argv is None else argv)
            arguments.overrides = parse_overrides(rest, arguments.options)
        code = arguments.run(arguments)
    except UserError as error:
        print(f"exgrpo-fast: {clean_line(error)}", file=sys.stderr)
        code = EXIT_USAGE
    except KeyboardInterrupt:
        code = EXIT_SIGNAL + 2
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_SIGNAL + 13
    sys.exit(code)


# --- commands -------------------------------------------------------------------------------------


def train(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    if arguments.max_steps is not None:
        config = config.model_copy(
            update={"train": config.train.model_copy(update={"max_steps": arguments.max_steps})}
        )
    place = place_of()
    refuse_with_several(config, place.count)
    check_inputs(config)
    if arguments.dry_run:
        print(dump_yaml(config), end="")
        print(derived_numbers(config))
        if config.replay.enabled:
            from exgrpo_fast.memory.store import store_note, store_plan

            device = arguments.device or "the training device"
            print(f"# {store_note(store_plan(config, num_questions=0), device)}")
        return show_plan(config, arguments.device, arguments.device_memory_gib, prefix="# ")
    out = Path(arguments.out or default_out(arguments.config))
    told: Supervised | None = arguments.supervised
    heartbeat = told.take_over() if told else None
    resumes = arguments.resume != "never"
    if place.is_first:
        folder = RunFolder(out, resume=resumes, lock=told.lock if told else None)
    else:
        folder = GuestFolder(out)
    with contextlib.closing(folder):
        if resumes:
            refuse_other_config(folder.config, config)
        # Of several processes torchrun is the supervisor.
        if arguments.supervise and not told and place.count == 1:
            return supervise(arguments, folder)
        from exgrpo_fast.session import train_session

        return train_session(
            config,
            folder,
            device=choose_device(arguments.device),
            resume=arguments.resume,
            stop_after=arguments.stop_after,
            deterministic=arguments.deterministic,
            heartbeat=heartbeat,
            place=place,
            deadline=arguments.deadline if place.count > 1 else None,
        )


def supervise(arguments: argparse.Namespace, folder: RunFolder) -> int:
    """The same command once more, as a worker that is watched."""
    from exgrpo_fast.supervisor import DEADLINE_SECONDS, Supervisor

    first = int(folder.newest_step() or 0) if arguments.resume != "never" else 0

    def command(told: Supervised, resume: bool) -> list[str]:
        words = [sys.executable, "-m", "exgrpo_fast", *arguments.words, "--supervised", str(told)]
        if resume:
            words += ["--resume", "auto"]
        if resume and arguments.stop_after:  # counts the steps of all lives together
            done = max((folder.newest_step() or 0) - first, 0)
            words += ["--stop-after", str(max(arguments.stop_after - done, 1))]
        return words

    return Supervisor(command, folder, deadline=arguments.deadline or DEADLINE_SECONDS).run()


def show_plan(config: Config, device: str | None, gib: float | None, *, prefix: str = "") -> int:
    """The memory plan; ConfigError where the run does not fit. The quickstart's model is not there
    before it is trained, and fits everywhere."""
    if config.model.name == "quickstart":
        return 0
    from exgrpo_fast.planning import NoShapes, plan_run

    name = require(config.model.name, "model.name", "a local folder or a hub name")
    try:
        planned = plan_run(config, name, device=device, memory_gib=gib, is_local=True)
    except NoShapes as error:
        cause = clean_line(error, max_line=200)
        print(f"{prefix}no memory plan without the model's config.json here ({cause})")
        return 0
    print("".join(f"{prefix}{line}".rstrip() + "\n" for line in planned.text.splitlines()), end="")
    if planned.refusal is not None:
        raise ConfigError(planned.refusal)
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    for path in arguments.data:
        require_file(path, "--data")
    if max(arguments.k) > arguments.n:
        raise ConfigError(f"-k {max(arguments.k)} needs as many samples: -n is {arguments.n}")
    require_rewards([arguments.reward], "--reward")
    from exgrpo_fast.session import eval_session

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
    from exgrpo_fast.session import sample_session

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


def reward_test(arguments: argparse.Namespace) -> int:
    functions = arguments.functions.split(",")
    require_rewards(functions, "--functions")
    for path in arguments.data:
        require_file(path, "--data")
    from exgrpo_fast.rewards.trial import built_in_golds, golds_of, try_reward

    fields = {"prompt_field": arguments.prompt_field, "answer_field": arguments.answer_field}
    golds = golds_of(arguments.data, **fields) or built_in_golds(functions)
    trial = try_reward(functions, golds)
    print(json.dumps(trial.as_dict(), indent=2) if arguments.json else trial)
    return 0 if trial.passed else 1


def init(arguments: argparse.Namespace) -> int:
    from exgrpo_fast.scaffold import write_project

    try:
        for path in write_project(Path(arguments.folder), recipe=arguments.recipe):
            print(path)
    except OSError as error:
        raise ConfigError(f"init {arguments.folder}: {error.strerror}") from None
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    from exgrpo_fast.doctor import collect, render

    config = load_config(arguments.config) if arguments.config else None
    if arguments.model:
        require_file(arguments.model, "--model")
    report = collect(model=Path(arguments.model) if arguments.model else None)
    print(json.dumps(report, indent=2) if arguments.json else render(report))
    if config is not None:
        return show_plan(config, None, arguments.device_memory_gib)
    return 0


def verify_checkpoint(arguments: argparse.Namespace) -> int:
    from exgrpo_fast.checkpoint import CheckpointError, verify

    try:
        verify(Path(arguments.folder))
    except CheckpointError as error:
        print(f"bad: {error}")
        return 1
    print(f"ok: {arguments.folder}")
    return 0


def export(arguments: argparse.Namespace) -> int:
    require_file(arguments.checkpoint, "--checkpoint")
    from exgrpo_fast.checkpoint import find_checkpoint
    from exgrpo_fast.export import export_checkpoint

    checkpoint = find_checkpoint(
        Path(arguments.checkpoint), lambda why: print(f"passed over: {why}", file=sys.stderr)
    )
    print(export_checkpoint(checkpoint, arguments.to, Path(arguments.out)))
    return 0


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


def buffer_stats(arguments: argparse.Namespace) -> int:
    require_file(arguments.path, "buffer stats")
    from exgrpo_fast.buffer_session import stats_session

    stats_session(Path(arguments.path), as_json=arguments.json)
    return 0


def buffer_ls(arguments: argparse.Namespace) -> int:
    require_file(arguments.path, "buffer ls")
    from exgrpo_fast.buffer_session import list_session

    list_session(
        Path(arguments.path),
        sort=arguments.sort,
        bucket=arguments.bucket,
        limit=arguments.limit,
    )
    return 0


def buffer_show(arguments: argparse.Namespace) -> int:
    require_file(arguments.path, "buffer show")
    from exgrpo_fast.buffer_session import show_session

    show_session(Path(arguments.path), arguments.id)
    return 0


def buffer_prune(arguments: argparse.Namespace) -> int:
    require_file(arguments.path, "buffer prune")
    require_absent(arguments.out)
    if arguments.max_age is None and arguments.max_per_question is None:
        raise ConfigError("buffer prune: give --max-age STEPS, --max-per-question N or both")
    from exgrpo_fast.buffer_session import prune_session

    prune_session(
        Path(arguments.path),
        Path(arguments.out),
        max_age=arguments.max_age,
        max_per_question=arguments.max_per_question,
    )
    return 0


def buffer_export(arguments: argparse.Namespace) -> int:
    require_file(arguments.path, "buffer export")
    require_absent(arguments.out)
    from exgrpo_fast.buffer_session import export_session

    export_session(Path(arguments.path), Path(arguments.out))
    return 0


# --- words ----------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line with a suggestion."""

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        if choice:
            message += suggest(choice[1], choice[2].replace("'", "").split(", "))
        command = self.prog.removeprefix("exgrpo-fast").strip()
        raise ConfigError(f"{command}: {message}" if command else message)


def suggest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def parser() -> Parser:
    top = Parser(
        prog="exgrpo-fast",
        description="RLVR on one GPU with fused losses and experience replay.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"exgrpo-fast {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        return add_command(commands, name, run, text)

    c = command("train", train, "train a policy; any config key can be set, as --train.lr 1e-5")
    c.add_argument("config", help=f"a YAML file, or a recipe: {', '.join(recipe_names())}")
    c.add_argument("--out", help="run directory (default runs/NAME)")
    c.add_argument(
        "--resume", type=resume_point, default="never", help="auto | never | STEP (default never)"
    )
    c.add_argument("--max-steps", type=positive, help="same as --train.max_steps")
    c.add_argument("--stop-after", type=positive, help="stop after so many steps of this session")
    c.add_argument("--deterministic", action="store_true", help="bitwise repeatable, slower")
    c.add_argument(
        "--dry-run", action="store_true", help="show the resolved config and memory plan, and exit"
    )
    add_memory(c)
    c.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    c.add_argument(
        "--no-supervise",
        dest="supervise",
        action="store_false",
        help="one process, which nobody restarts; for debuggers",
    )
    c.add_argument(
        "--deadline",
        type=positive,
        metavar="SECONDS",
        help="silence after which a run is stopped and restarted (300, more for slow phases)",
    )
    c.add_argument("--supervised", type=Supervised.parse, help=argparse.SUPPRESS)
    c.epilog = "config keys: " + " ".join(all_keys())

    c = command("eval", evaluate, "avg@n and pass@k of a model on held-out questions")
    c.add_argument("--model", required=True, help="a folder, such as RUN/checkpoints/step_N/hf")
    c.add_argument("--data", required=True, nargs="+", help=".jsonl or .parquet files")
    c.add_argument("-n", type=positive, default=8, help="samples per question (8)")
    c.add_argument("-k", type=positives, default=[1, 8], help="pass@k, comma separated (1,8)")
    c.add_argument(
        "--revise", type=positive, default=0, help="rounds in which failed responses are revised"
    )
    add_sampling(c)

    c = command("sample", sample, "look at completions with their rewards")
    c.add_argument("--model", required=True)
    c.add_argument("--data", help="take the question from this file")
    c.add_argument("--row", type=int, default=0, help="which question (0)")
    c.add_argument("--prompt", help="or ask this")
    c.add_argument("-n", type=positive, default=4)
    add_sampling(c)

    c = command("init", init, "write config.yaml, reward.py and sample data into a folder")
    c.add_argument("folder")
    c.add_argument("--recipe", default="exgrpo", choices=recipe_names())

    c = command("doctor", doctor, "what is installed, what works, what is missing for what")
    c.add_argument("--model", help="a folder that vLLM is to run")
    c.add_argument("--json", action="store_true")
    c.add_argument("--config", help="show the memory plan of this config or recipe as well")
    add_memory(c)

    c = command("score", score, "rows {gold, completion} -> {reward, reason, ms}")
    c.add_argument("--in", dest="input", required=True)
    c.add_argument("--out", dest="output", required=True)
    c.add_argument("--functions", default="math_verify", help="comma separated (math_verify)")

    c = command("reward-test", reward_test, "a reward against gold, wrong and nasty answers")
    c.add_argument("--functions", default="math_verify", help="comma separated (math_verify)")
    c.add_argument("--data", nargs="+", default=[], help="gold answers; default: a built-in list")
    c.add_argument("--prompt-field", default="prompt")
    c.add_argument("--answer-field", default="answer")
    c.add_argument("--json", action="store_true")

    c = command("check-data", check_data, "every bad row of a file, with line and reason")
    c.add_argument("file")
    c.add_argument("--prompt-field", default="prompt")
    c.add_argument("--answer-field", default="answer")

    c = command("verify-checkpoint", verify_checkpoint, "exit 0 if whole, else 1 and the bad file")
    c.add_argument("folder")

    c = command("export", export, "a model out of a checkpoint, as other tools read it")
    c.add_argument("out", help="a new folder")
    c.add_argument("--checkpoint", required=True, help="a checkpoint, or a run folder (its newest)")
    c.add_argument(
        "--to",
        choices=("hf", "merged", "adapter"),
        default="hf",
        help="hf, merged: a Hugging Face folder, any adapter merged; adapter: peft's own format",
    )

    add_buffer(commands)
    return top


def add_command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    made = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    made.set_defaults(run=run, options=made._option_string_actions)  # grows later
    return made


def add_buffer(commands: Any) -> None:
    text = "the experience of a run: look inside, make it smaller, export it"
    buffer = commands.add_parser("buffer", help=text, description=text, allow_abbrev=False)
    actions = buffer.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        made = add_command(actions, name, run, text)
        made.add_argument("path", help="a run folder (its newest checkpoint), or a checkpoint")
        return made

    a = action("stats", buffer_stats, "how much is stored, how old and how hard it is")
    a.add_argument("--json", action="store_true")

    a = action("ls", buffer_ls, "the stored questions, one a line")
    a.add_argument("--sort", choices=SORT_KEYS, default="bucket", help=f"{' | '.join(SORT_KEYS)}")
    a.add_argument("--bucket", type=natural, help="only the questions of this bucket")
    a.add_argument("--limit", type=positive, help="only the first so many")

    a = action("show", buffer_show, "a question and its stored trajectories")
    a.add_argument("id")

    a = action("prune", buffer_prune, "write the checkpoint anew, with fewer trajectories")
    a.add_argument("--max-age", type=natural, help="drop those born more steps ago")
    a.add_argument("--max-per-question", type=positive, help="drop the highest entropies above it")
    a.add_argument("--out", required=True, help="new, such as runs/NEW/checkpoints/step_80")

    a = action("export", buffer_export, "trajectories as a parquet file for replay.store.pool")
    a.add_argument("--out", required=True, help="a new .parquet file")


def add_memory(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--device-memory-gib", type=gibibytes, help="plan for a GPU of this size, not for this one"
    )


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


def endpoint_arguments(arguments: argparse.Namespace) -> dict[str, Any] | None:
    options = {"model": arguments.endpoint_model, "key_env": arguments.endpoint_key_env}
    if arguments.endpoint is not None:
        return {"url": arguments.endpoint, **options}
    if any(options.values()):
        raise ConfigError(
            f"{arguments.command}: --endpoint-model and --endpoint-key-env need --endpoint"
        )
    return None


def sampling_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("reward", "prompt_field", "answer_field", "max_completion_tokens")
    names += ("temperature", "top_p", "seed", "engine")
    return {name: getattr(arguments, name) for name in names}


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def gibibytes(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a size in GiB")
    return size


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return int(text)


def positives(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def resume_point(text: str) -> str:
    if text not in ("auto", "never") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is neither auto, never nor a step")
    return text


def parse_overrides(rest: Sequence[str], options: Sequence[str]) -> list[tuple[str, str]]:
    """['--train.lr', '1e-5', '--replay.enabled=false'] -> pairs of dotted key and text."""
    words, pairs = list(rest), []
    while words:
        word = words.pop(0)
        name, has_value, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name:
            raise ConfigError(f"train: '{word}' is neither an option nor the value of one")
        if "." not in name and name not in all_keys():
            near = {word: f"--{key}" for word, key in keys_by_last_word().items()}
            near |= {option.lstrip("-"): option for option in options}
            close = difflib.get_close_matches(name, near, n=1)
            hint = f"; did you mean '{near[close[0]]}'?" if close else ""
            raise ConfigError(f"train: unknown option '--{name}'{hint}")
        if not has_value:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"train: --{name} needs a value")
            value = words.pop(0)
        pairs.append((name, value))
    return pairs


# --- what can be known before anything is loaded --------------------------------------------------


def check_inputs(config: Config) -> None:
    """Missing values and files, before torch is imported."""
    if config.model.name is None:
        raise ConfigError("model.name is not set: give a local folder or a hub name")
    if config.data.train is None:
        raise ConfigError("data.train is not set: give a .jsonl file, a dataset or a gym task")
    for key, source in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        if isinstance(source, str) and Path(source).suffix in {".jsonl", ".json", ".parquet"}:
            require_file(source, key)
    if looks_local(config.model.name):
        require_file(config.model.name, "model.name")
    if config.prior_resampling.enabled and config.prior_resampling.model is not None:
        require_file(f"{config.prior_resampling.model}/config.json", "prior_resampling.model")
    require_rewards(config.reward.functions, "reward.functions")


def looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def require_file(path: str, key: str) -> None:
    if Path(path).exists():
        return
    folder = Path(path).parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    close = difflib.get_close_matches(Path(path).name, names, n=1)
    hint = f"; did you mean {folder / close[0]}?" if close else ""
    raise ConfigError(f"{key}: {path} does not exist{hint}")


def require_absent(out: str) -> None:
    if Path(out).exists():
        raise ConfigError(f"--out {out}: is there already")


def require_rewards(references: Sequence[str], key: str) -> None:
    from exgrpo_fast.rewards import RewardError, check_reference

    for reference in references:
        try:
            check_reference(reference)
        except RewardError as error:
            raise ConfigError(f"{key}: {error}") from None


def choose_device(asked: str | None) -> str:
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device (exgrpo-fast doctor says more)")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def default_out(config: str) -> str:
    return f"runs/{Path(config).stem}"


def derived_numbers(config: Config) -> str:
    rollout, train = config.rollout, config.train
    sequences = rollout.prompts_per_step * rollout.group_size
    per_update = sequences // train.minibatches
    return (
        f"# a step: {rollout.prompts_per_step} questions x {rollout.group_size} = {sequences} "
        f"responses of at most {rollout.max_completion_tokens} tokens, {train.minibatches} "
        f"updates of {per_update} responses, packs of {config.microbatch_tokens} tokens"
    )


if __name__ == "__main__":
    main()
