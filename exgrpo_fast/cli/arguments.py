"""The parser of the command line, its argument types, and checks that need no torch."""

from __future__ import annotations

import argparse
import ctypes
import difflib
import importlib.util
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from exgrpo_fast.config import Config, ConfigError, require, require_engine, suggest
from exgrpo_fast.core.http_client import (
    EndpointError,
    authorization,
    checked_url,
    refuse_unreachable,
)
from exgrpo_fast.data import DataReport, check_first_rows, names_file
from exgrpo_fast.rewards import RewardError, RewardPool, check_reference

FirstRows = dict[str, DataReport]  # by their source


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line with a suggestion."""

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """The value of an option is called by the last word of its `dest`: `--id-field FIELD`."""
        action = super().add_argument(*names, **options)
        is_named = bool(action.metavar or action.choices)
        if action.option_strings and action.nargs != 0 and not is_named:
            action.metavar = re.split(r"[._]", action.dest)[-1].upper()
        return action

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        if choice:
            message += suggest(choice[1], choice[2].replace("'", "").split(", "))
        command = self.prog.removeprefix("exgrpo-fast").strip()
        raise ConfigError(f"{command}: {message}" if command else message)


def add_command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    made = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    made.set_defaults(run=run, options=made._option_string_actions)  # grows later
    return made


def add_fields(command: argparse.ArgumentParser, section: str = "") -> None:
    """`section`: of the config, with a dot, where the values are config keys."""
    usual = {
        "prompt": "prompt, problem, question or messages",
        "answer": "answer, or another usual name",
    }
    for field, default in usual.items():
        name = f"{field}_field"
        command.add_argument(f"--{field}-field", dest=section + name, help=f"default: {default}")


def add_memory(command: argparse.ArgumentParser) -> None:
    text = "plan for a GPU of this size, not for this one"
    command.add_argument("--device-memory-gib", type=gibibytes, help=text)


# --- argument types ------------------------------------------------------------------------------


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def positives(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return int(text)


def gibibytes(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a size in GiB")
    return size


def resume_point(text: str) -> str:
    if text not in ("auto", "never") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is neither auto, never nor a step")
    return text


# --- checks before anything is loaded -------------------------------------------------------------


def check_inputs(
    config: Config,
    *,
    device: str | None = None,
    for_another_machine: bool = False,
    asks_servers: bool = True,
) -> FirstRows:
    """The first rows of the data; UserError for missing values, files, devices and packages, before
    torch is imported.

    `for_another_machine`: a plan, whose engine need not be installed here. `asks_servers`: False where
    a run goes on, which waits for servers that are lost.
    """
    name = require(config.model.name, "model.name", "a folder, a hub name or a .gguf file")
    require(config.data.train, "data.train", "a .jsonl file, a dataset or a gym task")
    for key, source in data_files(config).items():
        require_file(source, key)
    rows = first_rows(config, data_files(config).values())
    if not for_another_machine:
        check_device(device, config)
        require_engine(config)
        require_servers(config, ask=asks_servers)
    require_model(name, "model.name")
    if config.prior_resampling.enabled and config.prior_resampling.model is not None:
        require_file(f"{config.prior_resampling.model}/config.json", "prior_resampling.model")
    if config.algorithm.distillation.teacher is not None:
        require_model(config.algorithm.distillation.teacher, "algorithm.distillation.teacher")
    require_rewards(config.reward.functions, "reward.functions")
    for package in config.log.to:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"log.to: {package} is not installed: pip install {package}")
    return rows


def data_files(config: Config) -> dict[str, str]:
    """Key -> file of rows, of the sources that are files or are called like one."""
    sources = {"data.train": config.data.train, "data.eval": config.data.eval}
    return {
        key: source
        for key, source in sources.items()
        if isinstance(source, str) and names_file(source)
    }


def first_rows(config: Config, sources: Iterable[str]) -> FirstRows:
    fields = config.data.model_dump(include={"prompt_field", "answer_field", "id_field"})
    return {source: check_first_rows(source, **fields) for source in sources}


def check_before_torch(config: Config, rows: FirstRows, **options: Any) -> RewardPool | None:
    """As `build.before_torch` says, whose import takes a second."""
    from exgrpo_fast.build.before_torch import check_before_torch as check

    return check(config, rows, **options)


def require_servers(config: Config, *, ask: bool) -> None:
    """The addresses and the key of rollout servers that run already."""
    server = config.rollout.server
    if config.rollout.engine != "vllm_server" or not server.urls:
        return
    require_urls("rollout.server", server.urls, server.key_env, ask=ask)


def require_urls(key: str, urls: Sequence[str], key_env: str | None, *, ask: bool) -> None:
    """ConfigError for addresses and keys that cannot work, and, if asked, where no server is there."""
    try:
        for url in urls:
            checked_url(url)
        authorization(key_env)
        if ask:
            refuse_unreachable(urls)
    except EndpointError as error:
        raise ConfigError(f"{key}: {error}") from None


def require_model(name: str, key: str) -> None:
    if looks_local(name):
        require_file(name, key)
    folder = Path(name)
    if folder.is_file() and folder.suffix != ".gguf":
        raise ConfigError(f"{key}: {name} is a file; give a model's folder or a .gguf file")
    if not folder.is_dir():
        return
    if (folder / "adapter_config.json").exists():
        raise ConfigError(f"{key}: {name} is an adapter; merge it into its model first")
    if list(folder.glob("*.gguf")) or (folder / "config.json").exists():
        return
    if (folder / "checkpoints").is_dir():
        raise ConfigError(f"{key}: {name} is a run; its models are in checkpoints/step_N/hf")
    require_file(f"{name}/config.json", key)


def require_tokenizer(name: str, key: str) -> None:
    """ConfigError for a folder without any file of a tokenizer: transformers reads one of these."""
    folder = Path(name)
    if not folder.is_dir() or list(folder.glob("*.gguf")):
        return
    if not any(_OF_TOKENIZER.match(path.name) for path in folder.iterdir()):
        raise ConfigError(f"{key} {name}: no tokenizer: the folder has no tokenizer.json")


_OF_TOKENIZER = re.compile(r"tokenizer(?!_config)|vocab|tekken|.*\.(?:model|tiktoken)$")


def looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf")


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
    for reference in references:
        try:
            check_reference(reference)
        except RewardError as error:
            raise ConfigError(f"{key}: {error}") from None


def choose_device(asked: str | None, config: Config | None = None) -> str:
    """ConfigError where `asked` is not here, or `config` needs another; seconds before the run says so."""
    if asked == "cuda" and not has_cuda():
        raise ConfigError("--device cuda: torch sees no CUDA device (exgrpo-fast doctor says more)")
    device = asked or ("cuda" if has_cuda() else "cpu")
    if config is not None and device != "cuda":
        if config.model.attention not in ("auto", "sdpa"):
            key = f"model.attention {config.model.attention}"
            raise ConfigError(f"{key} needs a CUDA device, not {device}; take sdpa or auto")
        if config.model.quantization is not None:
            key = f"model.quantization {config.model.quantization}"
            raise ConfigError(f"{key} needs a CUDA device, not {device}")
    return device


def check_device(asked: str | None, config: Config) -> None:
    """As `choose_device`, as far as that loads no torch."""
    needs_cuda = config.model.attention not in ("auto", "sdpa") or config.model.quantization
    if asked == "cpu" or ((asked or needs_cuda) and lacks_cuda()):
        choose_device(asked, config)


def has_cuda() -> bool:
    if lacks_cuda():
        return False
    import torch

    return torch.cuda.is_available()


def lacks_cuda() -> bool:
    """Whether torch is a build without CUDA, or the driver has no device. Loads no torch, which takes
    seconds; False where only torch can tell."""
    if (torch := sys.modules.get("torch")) is not None:
        return not torch.cuda.is_available()
    found = importlib.util.find_spec("torch")
    try:
        text = Path(found.origin).with_name("version.py").read_text()  # pyright: ignore
        build = dict(re.findall(r"^(cuda|hip)\b.*= (.*)", text, re.MULTILINE))
        if build["hip"] != "None":
            return False
        if build["cuda"] == "None":
            return True
    except Exception:  # none is installed, or one with other files
        return False
    try:
        driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    except OSError:  # which torch loads by this name, too
        return True
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return bool(failed) or count.value == 0
