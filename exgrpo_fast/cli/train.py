"""`exgrpo-fast train`: arguments, dry run and supervisor.

The run itself is `train_run.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exgrpo_fast.cli.arguments import (
    FirstRows,
    add_command,
    add_memory,
    check_before_torch,
    check_inputs,
    choose_device,
    positive,
    require_file,
    require_tokenizer,
    resume_point,
)
from exgrpo_fast.cli.memory_plan import show_plan
from exgrpo_fast.cli.output import print_lines
from exgrpo_fast.config import (
    Config,
    ConfigError,
    all_keys,
    dump_yaml,
    hint,
    keys_by_last_word,
    load_config,
    recipe_names,
    refuse_other_config,
    refuse_world_size,
)
from exgrpo_fast.core.heartbeat import HEARTBEAT, Supervised
from exgrpo_fast.core.torchrun import place_of, refuse_missing_address
from exgrpo_fast.memory.budgets import store_note, store_plan
from exgrpo_fast.run.directory import GuestFolder, RunFolder
from exgrpo_fast.run.report.reading import flat
from exgrpo_fast.run.supervisor import DEADLINE_SECONDS, Supervisor


def add_train(commands: Any) -> None:
    c = add_command(
        commands, "train", train, "train a policy; any config key can be set, as --train.lr 1e-5"
    )
    c.add_argument(
        "config", metavar="CONFIG", help=f"a YAML file, or a recipe: {', '.join(recipe_names())}"
    )
    c.add_argument("--out", help="run directory (default runs/NAME)")
    c.add_argument(
        "--resume", type=resume_point, default="never", help="auto | never | STEP (default never)"
    )
    c.add_argument(
        "--from-rollouts",
        metavar="RUN",
        help="in place of CONFIG: train again on what a run trained on (log.updates)",
    )
    c.add_argument("--steps", type=step_range, metavar="A:B", help="which steps of --from-rollouts")
    c.add_argument("--max-steps", type=positive, metavar="N", help="same as --train.max_steps")
    c.add_argument(
        "--stop-after",
        type=positive,
        metavar="N",
        help="stop after N more steps; --resume auto goes on",
    )
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
        help="one process, without restarts; for debuggers",
    )
    c.add_argument(
        "--deadline",
        type=positive,
        default=DEADLINE_SECONDS,
        metavar="SECONDS",
        help="silence after which a run is stopped and restarted (300, more for slow phases)",
    )
    c.add_argument("--supervised", type=Supervised.parse, help=argparse.SUPPRESS)
    c.epilog = "config keys, each an option (docs/config.md): " + " ".join(all_keys())


def with_config(words: Sequence[str]) -> list[str]:
    """`train --from-rollouts RUN` takes no config; argparse would take the value of the first
    unknown option for it."""
    past = any(word.partition("=")[0] == "--from-rollouts" for word in words)
    if past and words[0] == "train":
        return ["train", "the run's own", *words[1:]]
    return list(words)


def train(arguments: argparse.Namespace) -> int:
    overrides = list(arguments.overrides)
    if arguments.from_rollouts is not None:
        return train_from_rollouts(arguments, overrides)
    if arguments.steps is not None:
        raise ConfigError("train: --steps goes with --from-rollouts RUN")
    if arguments.max_steps is not None:
        overrides.append(("train.max_steps", str(arguments.max_steps)))
    config = load_config(arguments.config, overrides)
    rank = place_of()
    refuse_world_size(config, rank.count)
    for_another = arguments.device_memory_gib is not None
    # A restarted run waits for its servers, which may be restarting too.
    may_be_restarted = arguments.supervised is not None or rank.count > 1
    rows = check_inputs(
        config,
        device=arguments.device,
        for_another_machine=for_another,
        asks_servers=not (may_be_restarted or arguments.dry_run),
    )
    if arguments.dry_run:
        return show_dry_run(arguments, config, rows, processes=rank.count) if rank.is_main else 0
    refuse_missing_address()
    require_tokenizer(str(config.model.name), "model.name")
    out = Path(arguments.out or f"runs/{Path(arguments.config).stem}")
    supervised: Supervised | None = arguments.supervised
    if supervised:
        supervised.take_over()
    resumes = arguments.resume != "never"
    if rank.is_main:
        folder = RunFolder(out, resume=resumes, lock=supervised.lock if supervised else None)
    else:
        folder = GuestFolder(out)
    with contextlib.closing(folder), HEARTBEAT.failures_reported(folder.append_to_log):
        checkpoint = None
        if resumes:
            refuse_other_config(folder.config, config)
            checkpoint = folder.checkpoint_of(arguments.resume)
        # With several ranks torchrun is the supervisor.
        if arguments.supervise and not supervised and rank.count == 1:
            return supervise(arguments, folder)
        rewards = None
        if rank.is_main:
            rewards = check_before_torch(
                config, rows, weights=not resumes, trains=True, checkpoint=checkpoint
            )
        device = choose_device(arguments.device, config)
        from exgrpo_fast.cli.train_run import train_run  # seconds of imports

        return train_run(
            config,
            folder,
            device=device,
            resume=arguments.resume,
            stop_after=arguments.stop_after,
            deterministic=arguments.deterministic,
            supervised=supervised is not None,
            rank=rank,
            deadline=arguments.deadline,
            rewards=rewards,
        )


def train_from_rollouts(arguments: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    """Exit code 0. The updates of a run's saved steps made again; every loss is compared with the
    run's own. UserError for steps that were not saved and for keys that cannot differ."""
    run, steps = Path(arguments.from_rollouts), arguments.steps
    if steps is None:
        raise ConfigError("train --from-rollouts RUN: give --steps A:B")
    if place_of().count > 1:
        raise ConfigError("train --from-rollouts does not go with several processes")
    require_file(str(run / "config.yaml"), "--from-rollouts")
    before = load_config(str(run / "config.yaml"))
    config = load_config(str(run / "config.yaml"), overrides)
    device = choose_device(arguments.device, config)
    from exgrpo_fast.build.past_updates import PastRun, refuse_fixed, train_again

    refuse_fixed(dict(flat(before.model_dump())), dict(flat(config.model_dump())), config)
    past = PastRun(run, before, *steps)
    past.check()
    out, deterministic = Path(arguments.out or f"runs/from_{run.name}"), arguments.deterministic
    with contextlib.closing(RunFolder(out, resume=False)) as folder:
        folder.write_text("config.yaml", dump_yaml(config))
        steps_made = train_again(past, config, folder, device=device, deterministic=deterministic)
        for metrics in steps_made:
            same = metrics["loss_hex"] == metrics["run_loss_hex"]
            print(
                f"step {metrics['step']}  loss {metrics['loss']:.6g}  "
                f"{'the same as in the run' if same else 'other than in the run'}  "
                f"grad norm {metrics['grad_norm']}",
                flush=True,
            )
    return 0


def step_range(text: str) -> tuple[int, int]:
    """'3:8' -> (3, 8), both included."""
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text} is not FIRST:LAST, such as 3:8")
    return int(first), int(last)


def show_dry_run(
    arguments: argparse.Namespace, config: Config, rows: FirstRows, *, processes: int
) -> int:
    gib, folder = arguments.device_memory_gib, Path(config.model.name or "")
    if gib is None and folder.exists():  # nothing is asked of a hub
        has_weights = any(folder.glob("*.safetensors*"))  # a plan needs none
        if rewards := check_before_torch(config, rows, weights=has_weights, trains=True):
            rewards.close()
    if gib is None:
        choose_device(arguments.device, config)
    print(dump_yaml(config), end="")
    print_lines(derived_numbers(config), indent="#     ")
    if config.replay.enabled:
        device = arguments.device or "the training device"
        note = store_note(store_plan(config, num_questions=0), device)
        print_lines(f"# {note}", indent="#     ")
    return show_plan(config, arguments.device, gib, prefix="# ", processes=processes)


def supervise(arguments: argparse.Namespace, folder: RunFolder) -> int:
    """Run the same command as a supervised child process, and restart it where it fails."""
    first = int(folder.newest_step() or 0) if arguments.resume != "never" else 0

    def command(supervised: Supervised, resume: bool) -> list[str]:
        words = [sys.executable, "-m", "exgrpo_fast", *arguments.words]
        words += ["--supervised", str(supervised)]
        if resume:
            words += ["--resume", "auto"]
        if resume and arguments.stop_after:  # counts the steps of all attempts together
            done = max((folder.newest_step() or 0) - first, 0)
            words += ["--stop-after", str(max(arguments.stop_after - done, 1))]
        return words

    return Supervisor(command, folder, deadline=arguments.deadline).run()


def derived_numbers(config: Config) -> str:
    rollout, train = config.rollout, config.train
    sequences = rollout.prompts_per_step * rollout.group_size
    per_update = sequences // train.minibatches
    return (
        f"# a step: {rollout.prompts_per_step} questions x {rollout.group_size} = {sequences} "
        f"completions of at most {rollout.max_completion_tokens} tokens, {train.minibatches} "
        f"updates of {per_update} completions, packs of {config.microbatch_tokens} tokens"
    )


def parse_overrides(rest: Sequence[str], options: Sequence[str]) -> list[tuple[str, str]]:
    """['--train.lr', '1e-5', '--replay.enabled=false'] -> pairs of dotted key and text."""
    words, pairs = list(rest), []
    while words:
        word = words.pop(0)
        name, has_value, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name:
            raise ConfigError(f"train: '{word}' is neither an option nor the value of one")
        if "." not in name and name not in all_keys():
            raise ConfigError(f"train: unknown option '--{name}'{_near(name, options)}")
        if not has_value:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"train: --{name} needs a value")
            value = words.pop(0)
        pairs.append((name, value))
    return pairs


def _near(name: str, options: Sequence[str]) -> str:
    """What an unknown option is called here, or which option it resembles."""
    near = {word: f"--{key}" for word, key in keys_by_last_word().items()}
    near |= {option.lstrip("-"): option for option in options}
    found = hint([name.replace("-", "_")])
    close = difflib.get_close_matches(name, near, n=1)
    if found and name not in near:
        return found.replace("'", "'--", 1)
    return f"; did you mean '{near[close[0]]}'?" if close else ""
