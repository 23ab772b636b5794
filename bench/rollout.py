"""How fast do the rollout engines generate, and what does it cost to keep them in step?

    python bench/rollout.py [--device cuda --model FOLDER --tokens 1024 --requests 512]

The engines are made as a training run makes them (`engines.py`), live side by side in one run and get
the same requests in turns: prompts of random tokens (or sums), several samples of each, a seed each. They draw
different tokens, so rates are per token generated, and ratios are taken round by round. On a CPU rates
are also given per CPU-second of all processes, which hardly depends on what else the machine does.

    generate        transformers' own `generate` with the trainer's weights and its own attention,
                    sampling from all of the vocabulary; a batch ends with its longest row
    transformers    the engine of that name: the same weights, drawn from by the trainer's loop
    vllm            vLLM in this process
    vllm_server     vLLM in processes of their own, one and as many as --servers says

`update` is the time until an engine has taken over new weights and dropped its cache; `sync` adds the
check of the weights. `start` ends with the first sync. With --steps a training run with rollout servers is repeated
with and without `rollout.generate_ahead`, in processes of their own; its reward is a toss of a coin.

On a CPU the model is made on the spot unless --model gives one; its weights are random. An engine
that this machine cannot run is left out with its reason. Writes NAME.json.
"""

import argparse
import datetime
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from loss import machine
from torch import Tensor

from exgrpo_fast.build.engines import build_engine, reserve_engine
from exgrpo_fast.build.models import make_policy
from exgrpo_fast.build.quickstart.toy_model import make_model, make_tokenizer
from exgrpo_fast.config import Config, validate
from exgrpo_fast.core.errors import UserError
from exgrpo_fast.model.folder_reading import (
    end_of_sequence_ids,
    load_tokenizer,
    quiet_libraries,
)
from exgrpo_fast.model.policy import Policy, inference
from exgrpo_fast.rollout.engine import Request, Sampling, request_seed
from exgrpo_fast.rollout.server.engine import ServerEngine
from exgrpo_fast.rollout.sync_check import VerifiedEngine
from exgrpo_fast.rollout.vllm.versions import find_vllm

SAMPLES = 8  # of each prompt
SETTINGS = ("OMP_NUM_THREADS", "TORCHDYNAMO_DISABLE", "VLLM_USE_V2_MODEL_RUNNER")


# ---- the same work for all -----------------------------------------------------------------------


def make_folder(arguments: argparse.Namespace, folder: Path) -> Path:
    """A random model that vLLM's CPU build can run, too, and its tokenizer."""
    tokenizer = make_tokenizer(["What is 1 + 2? It is 3.\n"] * 3, vocab_size=512)
    model = make_model(tokenizer, seed=0, layers=arguments.layers, width=arguments.width)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_requests(arguments: argparse.Namespace, tokenizer: Any, vocabulary: int) -> list[Request]:
    rng = random.Random(arguments.seed)
    count = arguments.requests // SAMPLES
    make = (
        partial(ask_sum, tokenizer)
        if arguments.sums
        else partial(random_tokens, arguments, vocabulary)
    )
    prompts = [make(rng) for _ in range(count)]
    return [
        Request(prompt, request_seed(arguments.seed, 1, str(i), sample))
        for i, prompt in enumerate(prompts)
        for sample in range(SAMPLES)
    ]


def random_tokens(
    arguments: argparse.Namespace, vocabulary: int, rng: random.Random
) -> tuple[int, ...]:
    low = 16  # below: special tokens
    return tuple(rng.randrange(low, vocabulary) for _ in range(arguments.prompt_tokens))


def ask_sum(tokenizer: Any, rng: random.Random) -> tuple[int, ...]:
    """As the recipe smollm2 asks; of two digits each, so that all prompts have the same length."""
    a, b = rng.randrange(10, 100), rng.randrange(10, 100)
    chat = [
        {"role": "system", "content": "Answer with the number."},
        {"role": "user", "content": f"What is {a} + {b}?"},
    ]
    return tuple(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])


def make_config(arguments: argparse.Namespace, folder: Path, engine: str, servers: int) -> Config:
    return validate(
        {
            "model": {"name": str(folder), "dtype": arguments.dtype},
            "data": {"max_prompt_tokens": arguments.prompt_tokens},
            "rollout": {
                "engine": engine,
                "max_completion_tokens": arguments.tokens,
                "temperature": arguments.temperature,
                "max_batch_sequences": arguments.requests,
                "server": {"count": servers},
            },
            "train": {"max_tokens_per_microbatch": 16384},
        }
    )


# ---- engines -------------------------------------------------------------------------------------


def start_engines(
    arguments: argparse.Namespace, folder: Path, prompt: tuple[int, ...], stack: ExitStack
) -> tuple[dict[str, Any], dict[str, float], dict[str, str]]:
    """Engines by name, seconds until each had its first sync, and why others are absent."""
    wanted = {name: (name, 1) for name in arguments.engines}  # vLLM takes memory first
    wanted |= {f"vllm_server_{n}": ("vllm_server", n) for n in arguments.servers}
    engines, start, absent, tokenizer = {}, {}, {}, load_tokenizer(str(folder))
    policy: Policy | None = None
    for name, (kind, servers) in wanted.items():
        config, began = make_config(arguments, folder, kind, servers), time.perf_counter()
        try:
            reserved = stack.enter_context(
                reserve_engine(config, str(folder), tokenizer, device=arguments.device)
            )
            waited = time.perf_counter() - began
            policy = policy or make_policy(config, str(folder), device=arguments.device)
            began = time.perf_counter()
            engines[name] = build_engine(config, policy, tokenizer, reserved, prompt_ids=prompt)
            engines[name].sync(0)
        except UserError as error:
            absent[name] = str(error)
            continue
        start[name] = waited + time.perf_counter() - began  # the policy is the trainer's
    if policy is not None and arguments.own_loop:
        engines["generate"], start["generate"] = OwnLoop(policy, tokenizer), 0.0
    return dict(sorted(engines.items())), start, absent


class OwnLoop:
    """transformers' `generate` for prompts of one length."""

    def __init__(self, policy: Policy, tokenizer: Any) -> None:
        self.policy = policy
        self.options: dict[str, Any] = {
            "do_sample": True,
            "top_k": 0,
            "top_p": 1.0,
            "eos_token_id": end_of_sequence_ids(policy.model.generation_config, tokenizer),
        }
        self.options["pad_token_id"] = self.options["eos_token_id"][0]

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Any]:
        ids = torch.tensor([request.prompt_ids for request in requests])
        torch.manual_seed(requests[0].seed % 2**31)
        self.options |= {"temperature": sampling.temperature}
        with inference(self.policy.model), self.policy.as_loaded(), self.policy.autocast():
            drawn: Any = self.policy.model.generate(  # pyright: ignore[reportCallIssue]
                ids.to(self.policy.device),
                attention_mask=torch.ones_like(ids).to(self.policy.device),
                max_new_tokens=sampling.max_completion_tokens,
                **self.options,
            )
        return [self._completion(row) for row in drawn[:, ids.shape[1] :].cpu()]

    def _completion(self, tokens: Tensor) -> Any:
        """Up to and with the first end token."""
        ends = torch.isin(tokens, torch.tensor(self.options["eos_token_id"])).nonzero()
        return SimpleNamespace(token_ids=tokens[: int(ends[0]) + 1] if len(ends) else tokens)


# ---- measuring -----------------------------------------------------------------------------------


def measure_generation(
    engines: dict[str, Any], requests: list[Request], arguments: argparse.Namespace
) -> dict[str, list[dict[str, float]]]:
    """For each engine and round: seconds, CPU-seconds, tokens."""
    sampling = Sampling(arguments.tokens, arguments.temperature)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for engine in engines.values():
        engine.generate(requests[:SAMPLES], sampling)  # what is compiled at first use
    for _ in range(arguments.repeats):
        for name, engine in engines.items():
            began, used = time.perf_counter(), cpu_seconds(engine)
            lengths = [len(c.token_ids) for c in engine.generate(requests, sampling)]
            rounds[name].append(
                {
                    "seconds": time.perf_counter() - began,
                    "cpu_seconds": cpu_seconds(engine) - used,
                    "tokens": sum(lengths),
                }
            )
    return rounds


def cpu_seconds(engine: Any) -> float:
    """Used so far by this process and the engine's servers."""
    inner = engine.engine if isinstance(engine, VerifiedEngine) else engine
    servers = inner.fleet.servers if isinstance(inner, ServerEngine) else []
    ticks = 0
    for pid in (os.getpid(), *(server.connection.health()["pid"] for server in servers)):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime, stime
    return ticks / os.sysconf("SC_CLK_TCK")


def measure_sync(engines: dict[str, Any], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of the update alone and of the whole sync, and the gap that its check found."""
    found: dict[str, dict[str, list[float]]] = {}
    for version in range(1, repeats + 1):
        for name, engine in engines.items():
            if not isinstance(engine, VerifiedEngine):
                continue
            of_one = found.setdefault(name, {"update": [], "sync": [], "gap": []})
            for part, sync in (("update", engine.engine.sync), ("sync", engine.sync)):
                began = time.perf_counter()
                figures = sync(version)
                of_one[part].append(time.perf_counter() - began)
            of_one["gap"].append(figures["sync_gap"])
    return found


def rows_of(
    rounds: dict[str, list[dict[str, float]]],
    syncs: dict[str, dict[str, list[float]]],
    start: dict[str, float],
) -> list[dict[str, Any]]:
    def rates(name: str, per: str = "seconds") -> list[float]:
        return [one["tokens"] / one[per] for one in rounds[name]]

    rows = []
    for name in rounds:
        ratios = [a / b for a, b in zip(rates(name), rates("transformers"), strict=True)]
        row: dict[str, Any] = {
            "engine": name,
            "tokens_per_second": statistics.median(rates(name)),
            "fastest": max(rates(name)),
            "slowest": min(rates(name)),
            "to_transformers": statistics.median(ratios),
            "to_transformers_range": [min(ratios), max(ratios)],
            "tokens_per_cpu_second": statistics.median(rates(name, "cpu_seconds")),
            "tokens": statistics.median(one["tokens"] for one in rounds[name]),
            "start_seconds": start[name],
        }
        if name in syncs:
            row["update_seconds"] = statistics.median(syncs[name]["update"])
            row["sync_seconds"] = statistics.median(syncs[name]["sync"])
            row["canary_gap_max"] = max(syncs[name]["gap"])
        rows.append(row)
    return rows


# ---- generation ahead ----------------------------------------------------------------------------


# Groups with and without success, so that there is something to train on.
REWARD = """
def odd(prompts, completions, **columns):
    return [float(sum(map(ord, completion)) % 2) for completion in completions]
"""


def measure_ahead(arguments: argparse.Namespace, folder: Path, place: Path) -> dict[str, Any]:
    """Seconds a step of the same run, alternating; a run's first two steps are not counted."""
    data = place / "data.jsonl"
    rows = ({"prompt": f"What is {i} + {i % 7}?", "answer": str(i + i % 7)} for i in range(512))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "reward.py").write_text(REWARD)
    seconds: dict[str, list[float]] = {"off": [], "on": []}
    parts: dict[str, list[float]] = {"rollout": [], "update": []}
    for number in range(arguments.ahead_repeats):
        for name in ("off", "on") if number % 2 == 0 else ("on", "off"):
            steps = train(arguments, folder, data, place / f"{name}{number}", ahead=name == "on")
            seconds[name] += [step["step_seconds"] for step in steps]
            if name == "off":
                parts["rollout"] += [step["seconds_rollout"] for step in steps]
                parts["update"] += [step["seconds_update"] for step in steps]
    medians = {name: statistics.median(of_one) for name, of_one in seconds.items()}
    return {
        "steps": len(seconds["on"]),
        "step_seconds": medians["off"],
        "update_seconds": statistics.median(parts["update"]),
        "rollout_seconds": statistics.median(parts["rollout"]),
        "step_seconds_ahead": medians["on"],
        "speedup": medians["off"] / medians["on"],
    }


def train(
    arguments: argparse.Namespace, folder: Path, data: Path, out: Path, *, ahead: bool
) -> list[dict[str, Any]]:
    options = {
        "model.name": folder,
        "model.dtype": arguments.dtype,
        "data.train": data,
        "data.max_prompt_tokens": 64,
        "reward.functions": f"[{data.parent / 'reward.py'}:odd]",
        "rollout.engine": "vllm_server",
        "rollout.generate_ahead": str(ahead).lower(),
        "rollout.prompts_per_step": max(arguments.requests // SAMPLES, 1),
        "rollout.group_size": SAMPLES,
        "rollout.max_completion_tokens": arguments.tokens,
        "train.max_tokens_per_microbatch": 16384,
        "train.max_steps": arguments.steps,
        "train.lr": 1e-9,  # answers stay as long as they are
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "exgrpo_fast", "train", "dr_grpo", "--out", str(out)]
    command += ["--device", arguments.device, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    lines = (out / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    return [step for step in steps if "step_seconds" in step][2:-1]  # the last has nothing ahead


# ---- everything ----------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace, place: Path) -> dict[str, Any]:
    folder = arguments.model or make_folder(arguments, place / "model")
    tokenizer = load_tokenizer(str(folder))
    requests = make_requests(arguments, tokenizer, len(tokenizer))
    before = os.getloadavg()[0]
    with ExitStack() as stack:
        engines, start, absent = start_engines(arguments, folder, requests[0].prompt_ids, stack)
        rounds = measure_generation(engines, requests, arguments)
        syncs = measure_sync(engines, arguments.repeats)
    ahead = {}
    if arguments.steps and any(name.startswith("vllm_server") for name in engines):
        ahead = {"generate_ahead": measure_ahead(arguments, folder, place)}
    vllm = find_vllm()
    names = (
        "requests",
        "sums",
        "prompt_tokens",
        "tokens",
        "temperature",
        "dtype",
        "repeats",
        "seed",
    )
    return {
        "bench": "rollout",
        "date": datetime.date.today().isoformat(),
        **machine(arguments.device),
        "vllm": vllm.name if vllm else None,
        "model": arguments.model.name
        if arguments.model
        else f"random Qwen3, {arguments.layers} x {arguments.width}",
        **{name: getattr(arguments, name) for name in names},
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        "load_average": [round(before, 2), round(os.getloadavg()[0], 2)],  # above cores: others ran
        "rows": rows_of(rounds, syncs, start),
        "absent": absent,
        **ahead,
    }


def print_results(results: dict[str, Any]) -> None:
    print(
        f"{'':16}{'tokens/s':>10}{'x':>7}{'/CPU s':>9}{'start s':>9}{'update s':>10}{'sync s':>9}"
    )
    for row in results["rows"]:
        cells = [f"{row[key]:9.3f}" for key in ("update_seconds", "sync_seconds") if key in row]
        print(
            f"{row['engine']:16}{row['tokens_per_second']:10.0f}{row['to_transformers']:7.2f}"
            f"{row['tokens_per_cpu_second']:9.0f}{row['start_seconds']:9.1f} {' '.join(cells)}"
        )
    for name, why in results["absent"].items():
        print(f"{name}: {why}")
    if "generate_ahead" in results:
        print("generate_ahead:", json.dumps(results["generate_ahead"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; default: a random one")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument(
        "--sums", action="store_true", help="ask a chat model sums, as smollm2 does"
    )
    parser.add_argument("--tokens", type=int, default=128, help="longest completion")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--engines", nargs="+", default=["vllm", "transformers"])
    parser.add_argument(
        "--own-loop", action="store_true", help="transformers' `generate` beside it"
    )
    parser.add_argument("--servers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=12, help="of the training runs; 0: none")
    parser.add_argument("--ahead-repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="rollout")
    parser.add_argument("--out", type=Path, help="a folder; default: bench/results/<device>")
    arguments = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as place:
        results = measure(arguments, Path(place))
    print_results(results)
    device = results["device"].lower().replace(" ", "-")
    folder = arguments.out or Path(__file__).parent / "results" / device
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{arguments.name}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
