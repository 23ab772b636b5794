"""The trainer and its parts: verifier, evaluator, objective, optimiser, checkpoints, metric sinks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from exgrpo_fast.build.engines import engine_scores, find_layer, mismatch_rule
from exgrpo_fast.build.environment import config_digest, package_versions
from exgrpo_fast.build.experience import make_hindsight, make_replay
from exgrpo_fast.build.models import (
    make_distillation,
    make_frozen_policy,
)
from exgrpo_fast.build.rewards import make_scorer
from exgrpo_fast.config import Config
from exgrpo_fast.core.errors import UserError
from exgrpo_fast.core.process_group import SINGLE_PROCESS, Processes
from exgrpo_fast.core.types import Question
from exgrpo_fast.experience.fresh import FreshSource
from exgrpo_fast.experience.hindsight.source import HindsightPrompt
from exgrpo_fast.experience.prior.compatibility import fingerprint
from exgrpo_fast.experience.prior.protocols import Prior
from exgrpo_fast.experience.question_stream import QuestionStream
from exgrpo_fast.experience.scoring import Verifier
from exgrpo_fast.model.folder_reading import Tokenizer, make_decode
from exgrpo_fast.model.hf_folder import HuggingFaceFolder
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.rewards import RewardPool
from exgrpo_fast.rollout.engine import RolloutEngine, Sampling
from exgrpo_fast.rollout.journal import JournalledEngine
from exgrpo_fast.run.checkpoint.format import Checkpoints
from exgrpo_fast.run.checkpoint.writer import CheckpointWriter
from exgrpo_fast.run.directory import RunFolder
from exgrpo_fast.run.display import Screen
from exgrpo_fast.run.sinks import (
    CompletionLog,
    FanOut,
    JsonlSink,
    MetricSink,
    TensorBoardSink,
    WandbSink,
)
from exgrpo_fast.training.advantages import ADVANTAGES, AdvantageRule, grpo_sample_std, quantile
from exgrpo_fast.training.batch import WeightRule
from exgrpo_fast.training.collector import Collector, OverlongRule
from exgrpo_fast.training.evaluate import Evaluator
from exgrpo_fast.training.learner import Learner
from exgrpo_fast.training.optim.gradient_release import ReleasingOptimiser
from exgrpo_fast.training.optim.optimiser import Optimiser, linear_warmup
from exgrpo_fast.training.reference import BehaviourReference, Reference
from exgrpo_fast.training.saved_updates import BadBatches, UpdateLog
from exgrpo_fast.training.token_advantages import (
    ClipCov,
    Distillation,
    EntropyShaping,
    HighEntropyTokens,
    KLCov,
    Rule,
    without_rewards,
)
from exgrpo_fast.training.trainer import Trainer
from exgrpo_kernels import PolicyObjective


def make_trainer(
    config: Config,
    *,
    policy: Policy,
    reference: Reference | BehaviourReference | None,
    engine: RolloutEngine,
    rewards: RewardPool | None,
    train: Sequence[Question],
    held_out: Sequence[Question],
    tokenizer: Tokenizer,
    folder: RunFolder,
    screen: Screen,
    sink: MetricSink,
    prior: Prior,
) -> Trainer:
    """Sources, collector, learner, evaluator and trainer.

    `rewards`: None on all ranks but 0, which scores and writes for them.
    """
    rollout, processes = config.rollout, policy.processes
    dynamic = rollout.dynamic_sampling
    stream = QuestionStream(train, seed=config.train.seed, min_live=2 * rollout.prompts_per_step)
    replay = make_replay(config, policy, train, stream, tokenizer)
    verifier = make_verifier(config, rewards, tokenizer, screen, processes)
    fresh = make_fresh(config, policy, engine)
    collector = Collector(
        stream=stream,
        fresh=fresh,
        replay=replay,
        verifier=verifier,
        prior=prior,
        hindsight=make_hindsight(config, fresh, verifier, rewards, tokenizer),
        screen=screen,
        advantages=make_advantages(config),
        overlong=OverlongRule(
            rollout.max_completion_tokens, config.algorithm.overlong.soft_penalty_tokens
        ),
        prompts_per_step=rollout.prompts_per_step,
        group_size=rollout.group_size,
        max_extra_batches=dynamic.max_extra_batches if dynamic.enabled else None,
    )
    return Trainer(
        stream=stream,
        replay=replay,
        collector=collector,
        learner=make_learner(config, policy, reference),
        engine=engine,
        objective=make_objective(config),
        evaluator=make_evaluator(config, engine, verifier, screen),
        eval_questions=held_out,
        writer=make_writer(config, policy, tokenizer, folder, screen, engine),
        bad_batches=BadBatches(folder.bad_batches, keeps=processes.is_main),
        update_log=UpdateLog(folder.updates, keeps=config.log.updates and processes.is_main),
        sink=sink,
        completion_log=CompletionLog(folder.completions, keeps=processes.is_main),
        screen=screen,
        max_steps=config.train.max_steps,
        eval_every=config.eval.every,
        checkpoint_every=config.checkpoint.every,
        completions_every=config.log.completions_every,
        generate_ahead=rollout.generate_ahead,
        processes=processes,
    )


def make_verifier(
    config: Config,
    rewards: RewardPool | None,
    tokenizer: Tokenizer,
    screen: Screen,
    processes: Processes = SINGLE_PROCESS,
) -> Verifier:
    """`rewards`: None on ranks other than 0."""
    scorer = make_scorer(config, rewards) if rewards is not None else None
    return Verifier(scorer, make_decode(tokenizer), screen, processes)


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
        num_examples=config.eval.examples,
    )


def make_fresh(config: Config, policy: Policy, engine: RolloutEngine) -> FreshSource:
    """UserError where the model's logits do not go with the way of drawing."""
    rollout = config.rollout
    sampling = Sampling(
        rollout.max_completion_tokens,
        rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
    )
    if sampling.top_k > 0 and policy.head.softcap is not None:
        raise UserError("rollout.top_k does not go with a model that caps its logits; set it to 0")
    return FreshSource(
        engine,
        policy,
        sampling=sampling,
        seed=config.train.seed,
        mismatch=mismatch_rule(config, policy.device.type),
        engine_scores=engine_scores(config, policy),
    )


def make_learner(
    config: Config, policy: Policy, reference: Reference | BehaviourReference | None
) -> Learner:
    algorithm = config.algorithm
    return Learner(
        policy,
        make_optimiser(config, policy),
        weights=WeightRule(
            algorithm.aggregation,
            config.rollout.max_completion_tokens,
            mask_truncated=algorithm.overlong.mask_truncated,
            replay_coef=config.replay.coef,
        ),
        token_rules=make_token_rules(config, policy),
        minibatches=config.train.minibatches,
        reference=reference,
        distillation=make_distillation(config, policy),
        sparsity=config.train.sparsity,
        tail=config.train.sparse_tail,
    )


def make_token_rules(config: Config, policy: Policy) -> list[Rule]:
    """In the order in which they are applied; loads the teacher of a sampled distillation."""
    tokens, seed = config.algorithm.tokens, config.train.seed
    distillation = config.algorithm.distillation
    rules: list[Rule] = []
    if distillation.is_over_vocabulary:
        if not distillation.rewards:
            rules.append(without_rewards)
    elif distillation.teacher is not None:
        teacher = Reference(make_frozen_policy(config, distillation.teacher, policy))
        rules.append(Distillation(teacher.logprobs, distillation.coef, distillation.rewards))
    if tokens.entropy_shaping > 0:
        rules.append(EntropyShaping(tokens.entropy_shaping, tokens.entropy_shaping_cap))
    if tokens.high_entropy_share < 1:
        rules.append(HighEntropyTokens(tokens.high_entropy_share, tokens.divide_by))
    if tokens.clip_cov > 0:
        rules.append(ClipCov(tokens.clip_cov, *tokens.clip_cov_range, seed))
    if tokens.kl_cov > 0:
        rules.append(KLCov(tokens.kl_cov))
    return rules


def make_advantages(config: Config) -> AdvantageRule:
    algorithm = config.algorithm
    if algorithm.advantage == "quantile":
        advantage = partial(quantile, share=algorithm.quantile, std=algorithm.std)
        return AdvantageRule(advantage, config.replay.baseline)
    with_sample_std = (algorithm.advantage, algorithm.std) == ("grpo", "sample")
    advantage = grpo_sample_std if with_sample_std else ADVANTAGES[algorithm.advantage]
    return AdvantageRule(advantage, config.replay.baseline)


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
        tv_low=algorithm.tv_low,
        tv_high=algorithm.tv_high,
    )


def make_optimiser(config: Config, policy: Policy) -> Optimiser:
    train = config.train
    settings: dict[str, Any] = {
        "lr": train.lr,
        "kind": config.optimizer,
        "weight_decay": train.weight_decay,
        "betas": train.betas,
        "schedule": linear_warmup(train.warmup_steps),
        "max_grad_norm": train.max_grad_norm,
        "skip_grad_norm": train.skip_grad_norm,
    }
    parameters = policy.trainable_parameters
    if train.gradient_release:
        return ReleasingOptimiser(parameters, all_or_none=policy.all_or_none, **settings)
    return Optimiser(parameters, **settings)


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
            "tokenizer": fingerprint(tokenizer.get_vocab()),
            "vocabulary_size": len(tokenizer),
            "packages": package_versions(),
        },
    )
    journal = find_layer(engine, JournalledEngine)
    return CheckpointWriter(
        checkpoints,
        HuggingFaceFolder(policy, tokenizer),
        processes=policy.processes,
        warn=screen.note,
        # rollouts that a checkpoint has made superfluous
        on_committed=journal.forget_before if journal else lambda step: None,
    )


def open_sink(
    config: Config, folder: RunFolder, screen: Screen, num_steps: int, processes: Processes
) -> MetricSink:
    """The metrics of a run after `num_steps`, on rank 0; what an interrupted run wrote about later
    steps, which will be done again, is dropped."""
    if not processes.is_main:
        return MetricSink()
    JsonlSink(folder.metrics).truncate_after(num_steps)
    CompletionLog(folder.completions).truncate_after(num_steps)
    checkpoints = Checkpoints(folder.checkpoints)
    checkpoints.clear_leftovers()
    if names := checkpoints.set_aside_after(num_steps):
        screen.note(f"later checkpoints are set aside: {', '.join(names)}")
    sinks: list[MetricSink] = [JsonlSink(folder.metrics)]
    if "tensorboard" in config.log.to:
        sinks.append(TensorBoardSink(folder.path / "tensorboard", resumed_from=num_steps))
    if "wandb" in config.log.to:
        sinks.append(WandbSink("exgrpo-fast", folder.path.name, config.model_dump(mode="json")))
    return FanOut(sinks, warn=screen.note)
