"""Where trajectories come from, by config: replay, prior, hindsight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from exgrpo_fast.build.engines import find_layer
from exgrpo_fast.build.models import make_policy
from exgrpo_fast.config import Config, ConfigError, require
from exgrpo_fast.core.process_group import SINGLE_PROCESS, Processes
from exgrpo_fast.core.types import Question
from exgrpo_fast.experience.fresh import FreshSource
from exgrpo_fast.experience.hindsight.source import (
    HindsightPrompt,
    HindsightRecipe,
    HindsightSource,
)
from exgrpo_fast.experience.prior.compatibility import fingerprint
from exgrpo_fast.experience.prior.driver import Resampler
from exgrpo_fast.experience.prior.hf_backend import TransformersDrafter, TransformersPrior
from exgrpo_fast.experience.prior.protocols import Prior
from exgrpo_fast.experience.prior.sharded_backend import EngineDrafter, PackedPrior
from exgrpo_fast.experience.prior.source import PriorRecipe, PriorSource
from exgrpo_fast.experience.prior.triggers import Trigger
from exgrpo_fast.experience.prior.vllm_backend import VllmDrafter, VllmPrior
from exgrpo_fast.experience.question_stream import QuestionStream
from exgrpo_fast.experience.replay.protocol import NoReplay, Replay
from exgrpo_fast.experience.replay.recipe import ReplayRecipe
from exgrpo_fast.experience.replay.selectors import (
    QuestionSelector,
    gaussian_buckets,
    medium_questions,
    uniform_questions,
)
from exgrpo_fast.experience.replay.source import ReplaySource
from exgrpo_fast.experience.replay.starting_pool import load_pool, solutions_of
from exgrpo_fast.experience.replay.store import ExperienceStore
from exgrpo_fast.experience.scoring import Verifier
from exgrpo_fast.memory.budgets import store_plan
from exgrpo_fast.model.folder_reading import Tokenizer, end_of_sequence_ids, make_encode
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.rewards import RewardPool
from exgrpo_fast.rollout.engine import RolloutEngine
from exgrpo_fast.rollout.vllm.engine import VllmEngine
from exgrpo_fast.rollout.vllm.model import VllmModel


def make_replay(
    config: Config,
    policy: Policy,
    questions: Sequence[Question],
    stream: QuestionStream,
    tokenizer: Tokenizer,
) -> Replay:
    replay = config.replay
    takes_a_share = replay.questions != "stream" and replay.mixer not in ("spent_groups", "fifo")
    if not replay.enabled or (takes_a_share and replay.experience_ratio == 0.0):
        return NoReplay(
            stream,
            prompts_per_step=config.rollout.prompts_per_step,
            group_size=config.rollout.group_size,
        )
    store = ExperienceStore(
        store_plan(config, len(questions)),
        group_size=config.rollout.group_size,
        device=policy.device,
        evict=replay.store.evict,
        max_per_question=replay.store.max_per_question,
        max_groups=replay.store.max_groups,
        max_trajectories=replay.store.max_trajectories,
        spare_correct=replay.store.spare_correct,
        deduplicate=replay.store.deduplicate,
    )
    vocabulary = fingerprint(tokenizer.get_vocab())
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
        stream,
        make_replay_recipe(config),
        prompts_per_step=config.rollout.prompts_per_step,
        vocabulary=vocabulary,
        seed=config.train.seed,
    )


def make_replay_recipe(config: Config) -> ReplayRecipe:
    replay = config.replay
    same = (
        "mixer keep difficulty retire experience_ratio replay_ratio start_success_rate stop_after_steps select "
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
        return uniform_questions
    if replay.questions == "medium":
        return medium_questions(
            low=replay.medium_low,
            high=replay.medium_high,
            cooldown=replay.cooldown_steps,
            max_visits=replay.max_visits,
        )
    return None


def make_prior(
    config: Config,
    policy: Policy,
    tokenizer: Tokenizer,
    engine: RolloutEngine,
    vllm_prior: VllmModel | None,
) -> Prior:
    """`vllm_prior`: the prior that was reserved beside the vLLM in `engine`, which then drafts;
    None: both by transformers, with the trainer's own policy. On several ranks `engine` drafts, and
    the prior is sharded like the policy."""
    settings, rollout = config.prior_resampling, config.rollout
    if not settings.enabled:
        return Prior()
    name = require(settings.model, "prior_resampling.model", "a checkpoint folder")
    processes = policy.processes
    prior = make_policy(config, name, device=policy.device.type, processes=processes)
    prior.freeze()
    eos = end_of_sequence_ids(policy.model.generation_config, tokenizer)
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    width = policy.head.weight.shape[0]
    if vllm_prior is not None:
        drafting = find_layer(engine, VllmEngine)
        if drafting is None:
            raise TypeError("a prior in vLLM needs an engine in vLLM to draft for it")
        drafter, scorer = VllmDrafter(drafting), VllmPrior(vllm_prior)
    elif processes.count > 1:
        drafter = EngineDrafter(engine)
        scorer = PackedPrior(prior, num_tokens=num_tokens, vocabulary_size=width)
    else:
        drafter = TransformersDrafter(policy, vocabulary_size=width, eos_token_ids=eos)
        scorer = TransformersPrior(prior, num_tokens=num_tokens, vocabulary_size=width)
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
    rewards: RewardPool | None,
    tokenizer: Tokenizer,
) -> HindsightSource | None:
    if not config.hindsight.enabled:
        return None
    settings = config.hindsight.model_dump(exclude={"enabled", "max_prompt_tokens"})
    return HindsightSource(
        fresh,
        verifier,
        make_hindsight_prompt(config, rewards, tokenizer, verifier.processes),
        HindsightRecipe(**settings),
        seed=config.train.seed,
    )


def make_hindsight_prompt(
    config: Config,
    rewards: RewardPool | None,
    tokenizer: Tokenizer,
    processes: Processes = SINGLE_PROCESS,
) -> HindsightPrompt:
    """`rewards`: None on all ranks but 0, which broadcasts the texts of the rubrics."""

    def public_texts() -> dict[str, str]:
        assert rewards is not None
        return {name: rubric.public_text for name, rubric in rewards.rubrics.items()}

    return HindsightPrompt(
        tokenizer,
        lambda: processes.run_on_rank0(public_texts),
        max_prompt_tokens=config.hindsight.max_prompt_tokens,
    )
