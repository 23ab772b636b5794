"""`exgrpo-fast`: one file a command, with its arguments and its body. torch is imported inside the
body, so that a user's mistake is reported in one line before it is loaded.

Exit codes: 0 done, 2 usage or config, 69 engine lost, 70 numerical stop, 74 cannot save, 75 gave up
after restarts, 130/143 signals.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from exgrpo_fast import __version__
from exgrpo_fast.cli.arguments import Parser
from exgrpo_fast.cli.bench import add_bench
from exgrpo_fast.cli.buffer import add_buffer
from exgrpo_fast.cli.check_data import add_check_data
from exgrpo_fast.cli.diagnose import add_diagnose
from exgrpo_fast.cli.doctor import add_doctor
from exgrpo_fast.cli.eval import add_eval
from exgrpo_fast.cli.export import add_export
from exgrpo_fast.cli.fetch import add_fetch
from exgrpo_fast.cli.init import add_init
from exgrpo_fast.cli.report import add_report
from exgrpo_fast.cli.results import add_results
from exgrpo_fast.cli.reward_test import add_reward_test
from exgrpo_fast.cli.sample import add_sample
from exgrpo_fast.cli.score import add_score
from exgrpo_fast.cli.train import add_train, parse_overrides, train, with_config
from exgrpo_fast.cli.verify_checkpoint import add_verify_checkpoint
from exgrpo_fast.cli.watch import add_watch
from exgrpo_fast.config import ConfigError, suggest
from exgrpo_fast.core.errors import UserError
from exgrpo_fast.core.text import clean_line

EXIT_USAGE, EXIT_SIGNAL = 2, 128
FIRST_STEPS = f"""\
exgrpo-fast {__version__}: GRPO that learns from its own past

  exgrpo-fast doctor
      what works on this machine
  exgrpo-fast train quickstart --out runs/first
      train a toy: ten minutes on two CPU cores, no download
  exgrpo-fast watch runs/first
      its curves in the browser while it runs
  exgrpo-fast init my-run
      config, reward and rows, to train a model of your own

exgrpo-fast --help            the commands
exgrpo-fast COMMAND --help    its options
"""
COMMANDS = (
    add_train,
    add_watch,
    add_report,
    add_eval,
    add_sample,
    add_init,
    add_fetch,
    add_doctor,
    add_diagnose,
    add_score,
    add_reward_test,
    add_check_data,
    add_verify_checkpoint,
    add_export,
    add_buffer,
    add_bench,
    add_results,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code."""
    # OpenMP threads that spin while they wait slow a run down many times over as soon as anything
    # else uses the CPU. Read when torch is loaded, hence before it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code = outcome(argv)
        sys.stdout.flush()  # while an error of it can still be answered
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_SIGNAL + 13
    sys.exit(code)


def outcome(argv: Sequence[str] | None) -> int | str | None:
    """The exit code of one command."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        print(FIRST_STEPS, end="")
        return 0
    try:
        arguments, rest = parser().parse_known_args(with_config(words))
        if rest and arguments.run is not train:
            hint = suggest(rest[0], arguments.options)
            raise ConfigError(f"{arguments.command}: unknown argument '{rest[0]}'{hint}")
        if arguments.run is train:
            arguments.words = words
            arguments.overrides = parse_overrides(rest, arguments.options)
        return arguments.run(arguments)
    except UserError as error:
        print(f"exgrpo-fast: {clean_line(error)}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_SIGNAL + 2
    except SystemExit as ended:  # --help, --version
        return ended.code


def parser() -> Parser:
    top = Parser(
        prog="exgrpo-fast",
        description="GRPO that learns from its own past, on one GPU, with fused losses.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"exgrpo-fast {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    return top
