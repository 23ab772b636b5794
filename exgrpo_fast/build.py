"""The composition root: a checked Config becomes objects. The only file that names them all.

What can fail by a user's mistake (files, rewards, golds) is tried before the weights are loaded.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash
from transformers import AutoTokenizer

from exgrpo_fast.advantages import ADVANTAGES, Advantage, grpo_sample_std
from exgrpo_fast.bad_batches import BadBatches
from exgrpo_fast.buffer.pool import load_pool, solutions_of
from exgrpo_fast.buffer.selectors import (
    QuestionSelector,
    gaussian_buckets,
    medium_questions,
    uniform_questions,
)
from exgrpo_fast.buffer.store import ExperienceStore
from exgrpo_fast.checkpoint import Checkpoints, load_state, read_manifest
from exgrpo_fast.checkpoint_writer import CheckpointWriter
from exgrpo_fast.collect import Collector, OverlongRule
from exgrpo_fast.config import Config, ConfigError, GymTask, dump_yaml, require
from exgrpo_fast.data import read_rows
from exgrpo_fast.display import Screen
from exgrpo_fast.engines import (
    PreparedEngine,
    end_of_sequence_ids,
    mismatch_rule,
    prepare_engine,
)
from exgrpo_fast.errors import NumericalStop
from exgrpo_fast.evaluate import Evaluator
from exgrpo_fast.experience import Question
from exgrpo_fast.learner import Learner, ReplayTerm
from exgrpo_fast.lora import add_adapter, has_adapter, load_adapter
from exgrpo_fast.memory.plan import MemoryPlan
from exgrpo_fast.memory.store import store_note, store_plan
from exgrpo_fast.metrics import (
    CompletionLog,
    FanOut,
    JsonlSink,
    MetricSink,
    TensorBoardSink,
    WandbSink,
)
from exgrpo_fast.model_folder import HuggingFaceFolder
from exgrpo_fast.optim import Optimiser, linear_warmup
from exgrpo_fast.planning import fitted, wants_preflight
from exgrpo_fast.policy import Policy, PolicyError, Tokenizer, load_model
from exgrpo_fast.preflight import rehearse
from exgrpo_fast.quantization import nf4
from exgrpo_fast.random_state import seed_everything
from exgrpo_fast.reference import AdapterOff, Reference
from exgrpo_fast.resampling.compatibility import (
    fingerprint,
    read_vocabulary,
    refuse_other_vocabulary,
)
from exgrpo_fast.resampling.driver import Resampler
from exgrpo_fast.resampling.transformers_lane import TransformersDrafter, TransformersPrior
from exgrpo_fast.resampling.triggers import Trigger
from exgrpo_fast.rewards import RewardPool, RubricScorer
from exgrpo_fast.rollout.engine import RolloutEngine, Sampling
from exgrpo_fast.rollout.journal import JournalledEngine
from exgrpo_fast.run_folder import RunFolder
from exgrpo_fast.sources.fresh import FreshSource
from exgrpo_fast.sources.hindsight import HindsightRecipe, HindsightSource
from exgrpo_fast.sources.hindsight_prompt import HindsightPrompt
from exgrpo_fast.sources.prior import NoPrior, PriorRecipe, PriorSource
from exgrpo_fast.sources.questions import QuestionStream
from exgrpo_fast.sources.recall import NoReplay, Replay
from exgrpo_fast.sources.replay import ReplayRecipe, ReplaySource
from exgrpo_fast.trainer import Trainer
from exgrpo_fast.training_data import load_data, refuse_bad_golds
from exgrpo_fast.verify import Decode, Verifier
from exgrpo_kernels import PolicyObjective

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What a training run is made of."""

    trainer: Trainer
    policy: Policy
    tokenizer: Tokenizer


@contextlib.contextmanager
def open_run(
    config: Config, folder: RunFolder, screen: Screen, *, device: str, resume_from: Path | None
) -> Iterator[Run]:
    """Build a training run; leaving the block ends its reward workers and metric sinks."""
    quiet_libraries()
    with contextlib.ExitStack() as stack:
        start = start_folder(config, folder, screen, device=device)
        tokenizer = load_tokenizer(start)
        check_prior(config, start, tokenizer)
        rewards = stack.enter_context(make_rewards(config))
        train, held_out = load_data(config, tokenizer, screen)
        if config.data.check_answers:
            refuse_bad_golds([*train, *held_out], rewards, screen)
        if resume_from:
            refuse_other_tokenizer(resume_from, tokenizer)
        seed_everything(config.train.seed)
        config, plan = fitted(config, start, device=device, note=screen.note)
        model_path = str(resume_from / "hf") if resume_from else start
        prepared = prepare_engine(
            config,
            model_path,
            tokenizer,
            device=device,
            stack=stack,
            log_folder=folder.path,
            note=screen.note,
        )
        adapter = adapter_of(config, resume_from)
        policy = make_policy(
            config, start if adapter else model_path, device=device, adapter=adapter
        )
        refuse_broken_weights(policy, model_path)
        state = load_state(resume_from) if resume_from else {"num_steps": 0}
        forget_after(state["num_steps"], folder, screen)
        engine = journalled(
            prepared.attach(policy, train[0].prompt_ids),
            config,
            folder,
            num_steps=state["num_steps"],
        )
        sink = make_sink(config, folder, screen, resumed_from=state["num_steps"])
        stack.enter_context(contextlib.closing(sink))
        trainer = make_trainer(
            config,
            policy=policy,
            reference=make_reference(config, start, policy, device=device),
            engine=engine,
            rewards=rewards,
            train=train,
            held_out=held_out,
            tokenizer=tokenizer,
            folder=folder,
            screen=screen,
            sink=sink,
            prepared=prepared,
        )
        if resume_from:
            take_up(trainer, state)
            trainer.writer.committed = state["num_steps"]
        if plan is not None and wants_preflight(config, device):
            screen.note(run_preflight(config, trainer, plan))
        engine.sync(state["num_steps"])
        if isinstance(trainer.replay, ReplaySource):
            screen.note(store_note(trainer.replay.store.plan, device))
        yield Run(trainer, policy, tokenizer)


def refuse_other_tokenizer(checkpoint: Path, tokenizer: Tokenizer) -> None:
    """ConfigError where the token ids of the checkpoint would mean other words."""
    origin = read_manifest(checkpoint)["origin"]
    if origin and origin["tokenizer"] != vocabulary_of(tokenizer):
        raise ConfigError(
            f"--resume: {checkpoint} was made with another tokenizer ({origin['vocabulary_size']} "
            f"tokens) than model.name has ({len(tokenizer)} tokens)"
        )


def refuse_broken_weights(policy: Policy, path: str) -> None:
    """NumericalStop: nothing can be sampled from weights that are not finite."""
    for name, parameter in policy.model.named_parameters():
        if parameter.is_floating_point() and not parameter.isfinite().all():
            raise NumericalStop(f"{path}: {name} holds a value that is not finite")


def run_preflight(config: Config, trainer: Trainer, plan: MemoryPlan) -> str:
    """The largest step a run can bring, once; DoesNotFit where the device is too small."""
    rehearsal = rehearse(
        trainer.learner,
        trainer.objective,
        prompt_tokens=config.longest_prompt,
        completion_tokens=config.rollout.max_completion_tokens,
        state_bytes=plan.states.optimiser,
    )
    if trainer.learner.policy.device.type != "cuda":
        return rehearsal.note()  # of the whole process: not what the plan speaks of
    return rehearsal.note(plan.states_and_passes)


def take_up(trainer: Trainer, state: dict[str, Any]) -> None:
    """ConfigError where the config or the data no longer fit what was saved."""
    try:
        trainer.load_state_dict(state)
    except ValueError as error:
        raise ConfigError(f"--resume: {error}") from None


def make_trainer(
    config: Config,
    *,
    policy: Policy,
    reference: Reference | None,
    engine: RolloutEngine,
    rewards: RewardPool,
    train: Sequence[Question],
    held_out: Sequence[Question],
    tokenizer: Tokenizer,
    folder: RunFolder,
    screen: Screen,
    sink: MetricSink,
    prepared: PreparedEngine | None = None,
) -> Trainer:
    """Sources, collector, learner, evaluator and trainer, from the bottom up."""
    rollout, algorithm, seed = config.rollout, config.algorithm, config.train.seed
    stream = QuestionStream(train, seed=seed, min_live=2 * rollout.prompts_per_step)
    replay = make_replay(config, policy, train, tokenizer)
    sampling = Sampling(rollout.max_completion_tokens, rollout.temperature)
    extra_batches = rollout.dynamic_sampling.max_extra_batches
    fresh = FreshSource(
        engine,
        policy,
        sampling=sampling,
        seed=seed,
        mismatch=mismatch_rule(config, policy.device.type),
    )
    verifier = make_verifier(config, rewards, tokenizer, screen)
    collector = Collector(
        stream=stream,
        fresh=fresh,
        replay=replay,
        verifier=verifier,
        prior=make_prior(config, policy, tokenizer, prepared),
        hindsight=make_hindsight(config, fresh, verifier, rewards, tokenizer),
        screen=screen,
        overlong=OverlongRule(
            rollout.max_completion_tokens, algorithm.overlong.soft_penalty_tokens
        ),
        prompts_per_step=rollout.prompts_per_step,
        group_size=rollout.group_size,
        max_extra_batches=extra_batches if rollout.dynamic_sampling.enabled else None,
    )
    learner = Learner(
        policy,
        make_optimiser(config, policy),
        advantage=make_advantage(config),
        aggregation=algorithm.aggregation,
        max_completion_tokens=rollout.max_completion_tokens,
        minibatches=config.train.minibatches,
        mask_truncated=algorithm.overlong.mask_truncated,
        reference=reference,
        sparsity=config.train.sparsity,
        tail=config.train.sparse_tail,
        replay=ReplayTerm(config.replay.baseline, config.replay.coef),
    )
    evaluator = make_evaluator(config, engine, verifier, screen)
    return Trainer(
        stream=stream,
        replay=replay,
        collector=collector,
        learner=learner,
        engine=engine,
        objective=make_objective(config),
        evaluator=evaluator,
        eval_questions=held_out,
        writer=make_writer(config, policy, tokenizer, folder, screen, engine),
        bad_batches=BadBatches(folder.bad_batches),
        sink=sink,
        completion_log=CompletionLog(folder.completions),
        screen=screen,
        max_steps=config.train.max_steps,
        eval_every=config.eval.every,
        checkpoint_every=config.checkpoint.every,
        completions_every=config.log.completions_every,
        generate_ahead=rollout.generate_ahead,
    )


def make_writer(
    config: Config,
    policy: Policy,
    tokenizer: Tokenizer,
    folder: RunFolder,
    screen: Screen,
    engine: RolloutEngine,
) -> CheckpointWriter:
    """Checkpoints that say which config, tokenizer and packages they come from."""
    checkpoints = Checkpoints(
        folder.checkpoints,
        keep=config.checkpoint.keep,
        origin={
            "config": config_digest(config),
            "tokenizer": vocabulary_of(tokenizer),
            "vocabulary_size": len(tokenizer),
            "packages": package_versions(),
        },
    )
    return CheckpointWriter(
        checkpoints,
        HuggingFaceFolder(policy, tokenizer),
        warn=screen.note,
        on_committed=engine.forget_before if isinstance(engine, JournalledEngine) else nothing,
    )


def nothing(step: int) -> None:
    pass


def make_advantage(config: Config) -> Advantage:
    algorithm = config.algorithm
    if (algorithm.advantage, algorithm.std) == ("grpo", "sample"):
        return grpo_sample_std
    return ADVANTAGES[algorithm.advantage]


def make_objective(config: Config) -> PolicyObjective:
    algorithm = config.algorithm
    return PolicyObjective(
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        dual_clip=algorithm.dual_clip,
        ratio_level=algorithm.ratio_level,
        surrogate=algorithm.surrogate,
        kl_coef=algorithm.kl.coef,
        kl_estimator=algorithm.kl.estimator,
        entropy_coef=algorithm.entropy_coef,
    )


def make_replay(
    config: Config, policy: Policy, questions: Sequence[Question], tokenizer: Tokenizer
) -> Replay:
    replay = config.replay
    takes_a_share = replay.questions != "stream" and replay.mixer != "spent_groups"
    if not replay.enabled or (takes_a_share and replay.experience_ratio == 0.0):
        return NoReplay()
    store = ExperienceStore(
        store_plan(config, len(questions)),
        group_size=config.rollout.group_size,
        device=policy.device,
        evict=replay.store.evict,
        max_per_question=replay.store.max_per_question,
        max_groups=replay.store.max_groups,
        deduplicate=replay.store.deduplicate,
    )
    vocabulary = vocabulary_of(tokenizer)
    try:
        if replay.store.pool:
            pool = Path(replay.store.pool)
            store.add(load_pool(pool, [q.id for q in questions], vocabulary=vocabulary))
        if replay.store.pool_field:
            field, eos = replay.store.pool_field, tokenizer.eos_token_id
            store.add(solutions_of(questions, field, encode=make_encode(tokenizer), eos=eos))
    except (OSError, ValueError) as error:
        raise ConfigError(f"replay.store.pool: {error}") from None
    return ReplaySource(
        store,
        policy,
        questions,
        make_replay_recipe(config),
        prompts_per_step=config.rollout.prompts_per_step,
        vocabulary=vocabulary,
        seed=config.train.seed,
    )


def check_prior(config: Config, start: str, tokenizer: Tokenizer) -> None:
    """PriorError, before any weights are loaded, where the prior cannot guide the policy."""
    prior = config.prior_resampling
    if prior.enabled and prior.model is not None:
        refuse_other_vocabulary(
            read_vocabulary(start, tokenizer),
            read_vocabulary(prior.model, load_tokenizer(prior.model, "prior_resampling.model")),
        )


def make_prior(
    config: Config, policy: Policy, tokenizer: Tokenizer, prepared: PreparedEngine | None = None
) -> PriorSource | NoPrior:
    """With the two vLLM models of a prepared engine, or else in the trainer's own process."""
    settings, rollout = config.prior_resampling, config.rollout
    if not settings.enabled:
        return NoPrior()
    name = require(settings.model, "prior_resampling.model", "a checkpoint folder")
    prior = make_policy(config, name, device=str(policy.device))
    prior.model.requires_grad_(False)
    eos = end_of_sequence_ids(policy.model.generation_config, tokenizer)
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    width = policy.head.weight.shape[0]
    drafter = TransformersDrafter(policy, vocabulary_size=width, eos_token_ids=eos)
    scorer = TransformersPrior(prior, num_tokens=num_tokens, vocabulary_size=width)
    if prepared is not None and prepared.prior is not None and prepared.drafting is not None:
        from exgrpo_fast.resampling.vllm_pair import VllmDrafter, VllmPrior

        drafter, scorer = VllmDrafter(prepared.drafting), VllmPrior(prepared.prior)
    resampler = Resampler(
        drafter,
        scorer,
        Trigger(settings.trigger, settings.threshold, settings.rate),
        block_tokens=settings.block_tokens,
        max_completion_tokens=rollout.max_completion_tokens,
        eos_token_ids=eos,
    )
    same = "augmented_per_group stop_after_steps annealing positive_only importance weight_cap"
    return PriorSource(
        resampler,
        policy,
        PriorRecipe(**{name: getattr(settings, name) for name in same.split()}),
        prior=prior,
        num_tokens=num_tokens,
        max_batch_sequences=rollout.max_batch_sequences,
        seed=config.train.seed,
    )


def make_hindsight(
    config: Config,
    fresh: FreshSource,
    verifier: Verifier,
    rewards: RewardPool,
    tokenizer: Tokenizer,
) -> HindsightSource | None:
    if not config.hindsight.enabled:
        return None
    settings = config.hindsight.model_dump(exclude={"enabled", "max_prompt_tokens"})
    return HindsightSource(
        fresh,
        verifier,
        make_hindsight_prompt(config, rewards, tokenizer),
        HindsightRecipe(**settings),
        seed=config.train.seed,
    )


def make_hindsight_prompt(
    config: Config, rewards: RewardPool, tokenizer: Tokenizer
) -> HindsightPrompt:
    return HindsightPrompt(
        tokenizer,
        lambda: {name: rubric.public_text for name, rubric in rewards.rubrics.items()},
        max_prompt_tokens=config.hindsight.max_prompt_tokens,
    )


def make_replay_recipe(config: Config) -> ReplayRecipe:
    replay = config.replay
    same = (
        "mixer keep difficulty retire experience_ratio start_success_rate stop_after_steps select "
        "count min_stored prefilter max_age weight shaping clip_fresh"
    )
    return ReplayRecipe(
        questions=make_question_selector(config),
        **{name: getattr(replay, name) for name in same.split()},
    )


def make_question_selector(config: Config) -> QuestionSelector | None:
    replay = config.replay
    if replay.questions == "gaussian":
        return gaussian_buckets(mean=replay.bucket_mean, sigma=replay.bucket_sigma)
    if replay.questions == "uniform":
        return uniform_questions()
    if replay.questions == "medium":
        return medium_questions(
            low=replay.medium_low,
            high=replay.medium_high,
            cooldown=replay.cooldown_steps,
            max_visits=replay.max_visits,
        )
    return None


def make_optimiser(config: Config, policy: Policy) -> Optimiser:
    train = config.train
    return Optimiser(
        policy.trainable_parameters,
        lr=train.lr,
        kind=config.optimizer,
        weight_decay=train.weight_decay,
        betas=train.betas,
        schedule=linear_warmup(train.warmup_steps),
        max_grad_norm=train.max_grad_norm,
        skip_grad_norm=train.skip_grad_norm,
    )


def make_evaluator(
    config: Config,
    engine: RolloutEngine,
    verifier: Verifier,
    screen: Screen,
    *,
    prompt: HindsightPrompt | None = None,
    revisions: int = 0,
) -> Evaluator:
    sampling = Sampling(
        config.rollout.max_completion_tokens, config.eval.temperature, config.eval.top_p
    )
    return Evaluator(
        engine,
        verifier,
        screen,
        prompt=prompt,
        revisions=revisions,
        sampling=sampling,
        n=config.eval.n,
        ks=config.eval.k,
        seed=config.train.seed,
    )


def forget_after(step: int, folder: RunFolder, screen: Screen) -> None:
    """Drop what an interrupted run wrote about steps that will be done again."""
    JsonlSink(folder.metrics).truncate_after(step)
    CompletionLog(folder.completions).truncate_after(step)
    checkpoints = Checkpoints(folder.checkpoints)
    checkpoints.clear_leftovers()
    if names := checkpoints.set_aside_after(step):
        screen.note(f"later checkpoints are set aside: {', '.join(names)}")


def make_sink(
    config: Config, folder: RunFolder, screen: Screen, *, resumed_from: int
) -> MetricSink:
    sinks: list[MetricSink] = [JsonlSink(folder.metrics)]
    if "tensorboard" in config.log.to:
        sinks.append(TensorBoardSink(folder.path / "tensorboard", resumed_from=resumed_from))
    if "wandb" in config.log.to:
        sinks.append(WandbSink("exgrpo-fast", folder.path.name, config.model_dump(mode="json")))
    return FanOut(sinks, warn=screen.note)


def make_rewards(config: Config) -> RewardPool:
    reward = config.reward
    return RewardPool(
        reward.functions,
        weights=reward.weights,
        workers=reward.workers,
        timeout_seconds=reward.timeout_seconds,
    )


def make_verifier(
    config: Config, rewards: RewardPool, tokenizer: Tokenizer, screen: Screen
) -> Verifier:
    """JudgeError, in one line, where a judge is configured that does not answer."""
    scorer: RewardPool | RubricScorer = rewards
    if config.reward.judge is not None:
        from exgrpo_fast.rewards.judge import Judge

        scorer = RubricScorer(rewards, Judge(**config.reward.judge.model_dump()))
        scorer.check()
    elif judged := [name for name, rubric in rewards.rubrics.items() if rubric.judged]:
        raise ConfigError(
            f"reward.judge is not set, and only a judge can decide the rubrics {', '.join(judged)}"
        )
    return Verifier(scorer, make_decode(tokenizer), screen)


# --- model and tokenizer --------------------------------------------------------------------------


def start_folder(config: Config, folder: RunFolder, screen: Screen, *, device: str) -> str:
    """Where the initial policy lies; the quickstart's is made here first."""
    if config.model.name != "quickstart":
        return require(config.model.name, "model.name", "a local folder or a hub name")
    from exgrpo_fast.quickstart.prepare import prepare_quickstart

    path = folder.path / "warm_start"
    if not path.exists():
        for source in (config.data.train, config.data.eval):
            if isinstance(source, GymTask):  # a misspelt task is found before the warm start
                next(iter(read_rows(source.model_dump())), None)
        unfinished = folder.path / ".warm_start.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that died here
        prepare_quickstart(config, unfinished, screen, device=device)
        os.rename(unfinished, path)
    return str(path)


def load_tokenizer(name: str, key: str = "model.name") -> Tokenizer:
    """PolicyError when the tokenizer has no end-of-sequence token: nothing could ever stop."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise PolicyError(f"{key} {name}: no tokenizer: {str(error).splitlines()[0]}") from None
    if tokenizer.eos_token_id is None:
        raise PolicyError(f"{key} {name}: its tokenizer has no eos_token; set one and save it")
    return tokenizer


def make_decode(tokenizer: Tokenizer) -> Decode:
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True))


def make_encode(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])


def vocabulary_of(tokenizer: Tokenizer) -> str:
    """A fingerprint: equal for tokenizers that give every token the same id."""
    return fingerprint(tokenizer.get_vocab())


def make_policy(config: Config, name: str, *, device: str, adapter: Path | None = None) -> Policy:
    """The policy of a run; `adapter`: a folder whose adapter goes on, under model.lora."""
    lora, dtype = config.model.lora, getattr(torch, config.model.compute_dtype(device))
    quantization = nf4(dtype, device=device) if config.model.quantization else None
    model = load_model(name, dtype=getattr(torch, config.model.weights), quantization=quantization)
    if lora is not None:
        add_adapter(model, **lora.model_dump(), seed=config.train.seed, name=name)
        if adapter is not None:
            load_adapter(model, adapter)
    return wrap(config, model, device=device)


def wrap(config: Config, model: transformers.PreTrainedModel, *, device: str) -> Policy:
    return Policy(
        model,
        device=device,
        compute_dtype=getattr(torch, config.model.compute_dtype(device)),
        gradient_checkpointing=config.model.gradient_checkpointing,
        offload_activations=config.model.offload_activations,
        temperature=config.rollout.temperature,
        max_tokens_per_microbatch=config.microbatch_tokens,
    )


def make_reference(config: Config, name: str, policy: Policy, *, device: str) -> Reference | None:
    """The frozen policies, loaded only when a KL term needs them and no adapter can be put off."""
    kl = config.algorithm.kl
    if kl.coef == 0.0:
        return None

    def frozen() -> Policy:
        model = load_model(name, dtype=getattr(torch, config.model.weights))
        return wrap(config, model, device=device)

    keeps_base = has_adapter(policy.model) and kl.rebase_at_step is None
    return Reference(
        AdapterOff(policy) if keeps_base else frozen(),
        frozen() if kl.previous_share else None,
        previous_share=kl.previous_share,
        rebase_at_step=kl.rebase_at_step,
    )


def journalled(
    engine: RolloutEngine, config: Config, folder: RunFolder, *, num_steps: int
) -> JournalledEngine:
    """The engine with a log of what it has finished, so that no life of a run pays for it twice."""
    return JournalledEngine(
        engine, folder.rollouts, identity=config_digest(config), version=num_steps
    )


def adapter_of(config: Config, checkpoint: Path | None) -> Path | None:
    """Where the adapter to go on with lies. ConfigError where run and checkpoint differ in kind."""
    if checkpoint is None:
        return None
    adapter = checkpoint / "adapter"
    if adapter.exists() and config.model.lora is None:
        raise ConfigError(f"--resume: {checkpoint} holds an adapter, and model.lora is not set")
    return adapter if config.model.lora else None


# --- surroundings ---------------------------------------------------------------------------------


def quiet_libraries() -> None:
    """One screen, ours: no progress bars and advice from below."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def config_digest(config: Config) -> str:
    return xxhash.xxh3_128_hexdigest(dump_yaml(config).encode())


def package_versions() -> dict[str, str]:
    from exgrpo_fast import __version__

    names = ("torch", "transformers", "safetensors", "numpy")
    versions = {"exgrpo-fast": __version__, "python": platform.python_version()}
    return versions | {name: importlib.metadata.version(name) for name in names}


def environment(device: str) -> dict[str, Any]:
    """env.json: what a reader needs to judge the figures of a run."""
    from exgrpo_fast import __version__
    from exgrpo_fast.doctor import collect

    return {"exgrpo_fast": __version__, "device": device, **collect(self_test=False)}
