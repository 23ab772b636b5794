"""A tiny model, its tokenizer, and a trainer around it, built by the project's own `build`."""

from __future__ import annotations

import gc
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

# Before torch is loaded, and for every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Triton decides when it is imported whether kernels are Python; on a machine without a GPU they are.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedTokenizerFast

from exgrpo_fast.build.assembly import make_trainer
from exgrpo_fast.build.engines import make_transformers_engine
from exgrpo_fast.build.experience import make_prior
from exgrpo_fast.build.models import make_policy, make_reference
from exgrpo_fast.build.quickstart.toy_model import make_model, make_tokenizer
from exgrpo_fast.build.rewards import make_rewards
from exgrpo_fast.cli import main
from exgrpo_fast.config import Config, validate
from exgrpo_fast.core.types import Completion, Group, Question
from exgrpo_fast.memory import tracing
from exgrpo_fast.rewards import RewardPool
from exgrpo_fast.rollout.engine import UNOBSERVED, LocalEngine, Observer, Request, Sampling
from exgrpo_fast.run.directory import RunFolder
from exgrpo_fast.run.display import Screen
from exgrpo_fast.run.metrics import METRICS
from exgrpo_fast.run.sinks import MetricSink
from exgrpo_fast.training.batch import LossTerm
from exgrpo_fast.training.trainer import Trainer

REWARDS = Path(__file__).parent / "reward_functions.py"
# Of these a pool serves many tests: it knows nothing of the calls before.
STATELESS = ("right", "even_length")


# Where long files are. Processes that share the files end together if these come first.
LONG_FILES = (
    "tests/distributed/",
    "tests/test_examples.py",
    "tests/memory/",
    "tests/pretend_gpu/",
    "tests/kernels/test_rowwise.py",
    "tests/kernels/test_sparse.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONG_FILES))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What the imports made stays: the collector need not look at it again in every test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Enough for tensors this small, and on a busy machine much faster than two that wait."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _traces_are_made_once() -> Iterator[None]:
    """What a model's passes hold follows from the arguments alone and takes a second or more."""
    known: dict[tuple[Any, ...], tracing.Passes] = {}
    make = tracing.trace

    def trace(model: Any, setting: tracing.Setting, *, layers: int, tokens: int) -> tracing.Passes:
        key = (model.to_json_string(use_diff=False), repr(setting), layers, tokens)
        if key not in known:
            known[key] = make(model, setting, layers=layers, tokens=tokens)
        return known[key]

    with mock.patch.object(tracing, "trace", trace):
        yield


@pytest.fixture(autouse=True)
def _metrics_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that writes a metric which `run/metrics.py` does not list is an error."""
    step, publish = Trainer.step, Trainer._publish

    def checked_step(trainer: Trainer) -> tuple[Any, dict[str, Any]]:
        batch, metrics = step(trainer)
        assert metrics.keys() <= METRICS.keys(), metrics.keys() - METRICS.keys()
        return batch, metrics

    def checked_publish(trainer: Trainer, batch: Any, metrics: dict[str, Any]) -> None:
        publish(trainer, batch, metrics)
        assert metrics.keys() <= METRICS.keys(), metrics.keys() - METRICS.keys()

    monkeypatch.setattr(Trainer, "step", checked_step)
    monkeypatch.setattr(Trainer, "_publish", checked_publish)


def exit_code(*words: object) -> int:
    """Of one command in this process."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """run('train', 'quickstart', ...) -> Result, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> Result:
        capsys.readouterr()
        code = exit_code(*words)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def refused(run: Callable[..., Result]) -> Callable[..., str]:
    """The one line that a mistake is answered with."""

    def call(*words: object) -> str:
        result = run(*words)
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith("exgrpo-fast: ") and result.err.count("\n") == 1
        return result.err.removeprefix("exgrpo-fast: ").rstrip("\n")

    return call


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(["What is 1 + 2? right wrong <answer>3</answer>\n"] * 3, vocab_size=300)


@pytest.fixture(scope="session")
def model_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: Any) -> Path:
    """A saved random policy of 2 layers and width 64."""
    path = tmp_path_factory.mktemp("model")
    make_model(tokenizer, seed=0, layers=2, width=64).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_questions(tokenizer: PreTrainedTokenizerFast, names: Sequence[str]) -> list[Question]:
    """Questions whose prompts differ in content and length."""
    return [
        Question(
            name,
            tuple(tokenizer(f"What is {name} + {i}?")["input_ids"]),
            f"{name}?",
            "3",
            conversation=({"role": "user", "content": f"What is {name} + {i}?"},),
        )
        for i, name in enumerate(names)
    ]


def terms_of(trainer: Trainer, groups: Sequence[Group]) -> list[LossTerm]:
    """What the learner makes of groups whose advantages are not known yet."""
    return trainer.learner.weights.terms([trainer.collector.advantages.apply(g) for g in groups])


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that `work` allocated at a time, as torch's profiler records it."""
    gc.collect()  # what other tests left would be freed in between, and count against `work`
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events: Any = recorded.profiler.kineto_results.events()  # pyright: ignore
    live = peak = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        live += change
        peak = max(peak, live)
    return peak


class OwnEngine(LocalEngine):
    """Shares the trainer's weights, as far as a test is concerned."""

    def sync(self, version: int) -> dict[str, float]:
        return {}


class ScriptedEngine(OwnEngine):
    """Answers each visit of a question with the next line of its script.

    A script is a list of texts; the same text means the same tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question]) -> None:
        self.tokenizer = tokenizer
        self.name_of = {question.prompt_ids: question.id for question in questions}
        self.lines: dict[str, deque[str]] = defaultdict(deque)

    def expect(self, question_id: str, *texts: str) -> None:
        self.lines[question_id].extend(texts)

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        observer: Observer = UNOBSERVED,
    ) -> list[Completion]:
        texts = [self.lines[self.name_of[request.prompt_ids]].popleft() for request in requests]
        ids = [torch.tensor(self.tokenizer(f"{text}<|end|>")["input_ids"]) for text in texts]
        found = [Completion(i, torch.full((len(i),), -1.0), truncated=False) for i in ids]
        observer.finished(range(len(found)), found)
        return found


@pytest.fixture(scope="session")
def reward_pools() -> Iterator[dict[str, RewardPool]]:
    """By the settings of the rewards; a pool is two processes, which start as often as pools do."""
    pools: dict[str, RewardPool] = {}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture
def make_test_trainer(
    tokenizer: PreTrainedTokenizerFast,
    model_folder: Path,
    tmp_path: Path,
    reward_pools: dict[str, RewardPool],
) -> Iterator[Callable[..., Trainer]]:
    """make(questions, engine=None, **sections) -> Trainer; sections update a small config."""
    pools, count = [], 0

    def make(
        questions: Sequence[Question],
        *,
        engine: Any = None,
        function: str = "right",
        held_out: Sequence[Question] = (),
        **sections: dict[str, Any],
    ) -> Trainer:
        nonlocal count
        count += 1
        config = small_config(model_folder, function, sections)
        policy = make_policy(config, str(model_folder), device="cpu")
        key = config.reward.model_dump_json()
        if not (rewards := reward_pools.get(key)):
            rewards = make_rewards(config)
            if function in STATELESS:
                reward_pools[key] = rewards
            else:
                pools.append(rewards)
        engine = engine or make_transformers_engine(config, policy, tokenizer)
        return make_trainer(
            config,
            policy=policy,
            reference=make_reference(config, str(model_folder), policy),
            engine=engine,
            prior=make_prior(config, policy, tokenizer, engine, None),
            rewards=rewards,
            train=questions,
            held_out=held_out,
            tokenizer=tokenizer,
            folder=RunFolder(tmp_path / f"run{count}", resume=False),
            screen=Screen(),
            sink=MetricSink(),
        )

    yield make
    for pool in pools:
        pool.close()


def small_config(model: Path, function: str, sections: dict[str, dict[str, Any]]) -> Config:
    tree: dict[str, dict[str, Any]] = {
        "model": {"name": str(model), "gradient_checkpointing": False},
        "data": {"max_prompt_tokens": 32},
        "reward": {"functions": [f"{REWARDS}:{function}"], "workers": 1},
        "rollout": {"prompts_per_step": 4, "group_size": 4, "max_completion_tokens": 12},
        "train": {"lr": 1e-3, "max_tokens_per_microbatch": 256, "max_steps": 10},
        "eval": {"n": 2, "k": [1, 2]},
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    return validate(tree)
