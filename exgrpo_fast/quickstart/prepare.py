"""Make the quickstart's starting point: tokenizer, model, and a warm start to a middling policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from exgrpo_fast.config import Config, ConfigError, GymTask, WarmStartConfig
from exgrpo_fast.display import Screen
from exgrpo_fast.policy import Policy
from exgrpo_fast.quickstart.model import make_model, make_tokenizer
from exgrpo_fast.quickstart.solutions import worked_examples
from exgrpo_fast.quickstart.warm_start import tokenize_examples, warm_start
from exgrpo_fast.rollout.engine import Request, Sampling, request_seed
from exgrpo_fast.rollout.transformers_engine import TransformersEngine

EXAMPLES_SEED = 1_000_000  # gym rows are drawn from seed + index: far from train and eval seeds
NUM_PROBES = 256


def prepare_quickstart(config: Config, path: Path, screen: Screen, *, device: str) -> None:
    """Write a Hugging Face folder whose policy solves about `target_pass_rate` of the task.

    Held-out questions are kept out of the imitated examples. ConfigError when the task has no
    worked solutions.
    """
    task = config.data.train
    if not isinstance(task, GymTask) or task.gym != "chain_sum":
        raise ConfigError(
            "model.name quickstart: data.train must be the gym task chain_sum, the one with worked "
            "solutions; train another task from a model of yours"
        )
    settings, seed = config.warm_start, config.train.seed
    held_out = set()
    if isinstance(config.data.eval, GymTask):
        held_out = {q for q, _ in worked_examples(config.data.eval)}
    with screen.phase("make examples"):
        examples_task = task.model_copy(
            update={"size": settings.examples + NUM_PROBES, "seed": EXAMPLES_SEED * (1 + seed)}
        )
        pairs = [pair for pair in worked_examples(examples_task) if pair[0] not in held_out]
        tokenizer = make_tokenizer(f"{q}\n{s}" for q, s in pairs[:2000])
        policy = Policy(
            make_model(tokenizer, seed=seed),
            device=device,
            max_tokens_per_microbatch=config.train.max_tokens_per_microbatch,
        )
        examples = tokenize_examples(pairs, tokenizer)
    probe = Probe(policy, tokenizer, pairs[-NUM_PROBES:], settings)
    used = warm_start(
        policy,
        examples[:-NUM_PROBES],
        batches=settings.batches,
        batch_size=settings.batch_size,
        lr=settings.lr,
        seed=seed,
        screen=screen,
        good_enough=probe,
    )
    screen.note(
        f"warm start: {used} batches of {settings.batch_size}, pass@1 {probe.pass_rate:.2f}"
    )
    policy.model.save_pretrained(path)
    tokenizer.save_pretrained(path)


class Probe:
    """Every so many batches: has the policy reached the pass rate to start from?"""

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Sequence[tuple[str, str]],
        settings: WarmStartConfig,
    ) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self.solutions = [solution for _, solution in pairs]
        self.prompts = [example.prompt_ids for example in tokenize_examples(pairs, tokenizer)]
        self.engine = TransformersEngine(
            policy,
            eos_token_ids=[tokenizer.eos_token_id],
            pad_token_id=tokenizer.pad_token_id,
        )
        self.pass_rate = 0.0

    def __call__(self, batch: int) -> bool:
        if batch % self.settings.probe_every:
            return False
        requests = [
            Request(prompt, request_seed(0, "probe", str(i), batch))
            for i, prompt in enumerate(self.prompts)
        ]
        completions = self.engine.generate(requests, Sampling(max_completion_tokens=64))
        texts = [self.tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in completions]
        right = [
            text.split("<answer>")[-1] == solution.split("<answer>")[-1]
            for text, solution in zip(texts, self.solutions, strict=True)
        ]
        self.pass_rate = sum(right) / len(right)
        return self.pass_rate >= self.settings.target_pass_rate
