"""The check of the forward pass, of a config's policy and engine."""

from __future__ import annotations

from collections.abc import Sequence

from exgrpo_fast.build.engines import make_transformers_engine
from exgrpo_fast.build.environment import prepare_process
from exgrpo_fast.build.folder import check_folder
from exgrpo_fast.build.models import make_policy
from exgrpo_fast.config import Config, ConfigError, engine_kind, validate
from exgrpo_fast.model.folder_reading import Tokenizer, end_of_sequence_ids, load_tokenizer
from exgrpo_fast.model.folder_settings import positions
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.rollout.engine import RolloutEngine
from exgrpo_fast.rollout.forward_check import ForwardMismatch, check_forward
from exgrpo_fast.rollout.journal import JournalledEngine
from exgrpo_fast.rollout.shared_engine import SharedEngine
from exgrpo_fast.rollout.sync_check import TOLERANCE


def prove_forward(
    config: Config,
    policy: Policy,
    engine: RolloutEngine,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    *,
    option: str = "--train.allow_mismatch true",
) -> str:
    """What the check of the forward pass found, as a line. ConfigError where a part of it is another
    model's, unless train.allow_mismatch is set; every rank calls this, after the first `sync`.

    `option`: of the command, that sets it. An engine with other arithmetic agrees as far as `sync` asks.
    """
    tolerance, device = None, policy.device.type
    limit = positions(policy.model.config.get_text_config())
    longest = limit.limit if limit else None
    if engine_kind(config, device) != "transformers":
        dtype = config.model.compute_dtype(device)
        tolerance = config.rollout.sync_tolerance or TOLERANCE[dtype]
        # vLLM has room for the longest sequence of the run, and no more
        longest = min(longest or config.longest_sequence, config.longest_sequence)
    try:
        report = check_forward(
            policy,
            without_journal(engine),
            prompt_ids=prompt_ids,
            eos_token_ids=end_of_sequence_ids(policy.model.generation_config, tokenizer),
            longest=longest,
            engine_tolerance=tolerance,
        )
    except ForwardMismatch as error:
        if not config.train.allow_mismatch:
            raise ConfigError(f"{error}; {option} goes on all the same") from None
        return f"warning: {error}; train.allow_mismatch is set"
    return str(report)


def check_model(folder: str, *, device: str) -> str:
    """The check of a folder that nothing is trained from, by the transformers engine."""
    prepare_process(device)
    config = validate({"model": {"name": folder}, "rollout": {"engine": "transformers"}})
    tokenizer = load_tokenizer(folder)
    notes = check_folder(config, folder, tokenizer)
    policy = make_policy(config, folder, device=device)
    engine = make_transformers_engine(config, policy, tokenizer)
    prompt_ids = tokenizer("What is 12 + 30? Think first, then write the answer.")["input_ids"]
    report = prove_forward(config, policy, engine, tokenizer, prompt_ids)
    return "; ".join([report, *notes])


def without_journal(engine: RolloutEngine) -> RolloutEngine:
    """What is drawn for a check is no rollout of the run, and is not logged as one."""
    if isinstance(engine, JournalledEngine):
        return engine.engine
    if isinstance(engine, SharedEngine):
        inner = without_journal(engine.engine) if engine.engine else None
        return SharedEngine(inner, engine.policy, engine.processes)
    return engine
