"""Tokenizers without padding, without an end, and another one than the checkpoint's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_questions, small_config
from test_learner import GradientRecorder, collect, with_rewards

from exgrpo_fast.build.engines import make_transformers_engine
from exgrpo_fast.build.models import (
    make_policy,
    refuse_broken_weights,
)
from exgrpo_fast.build.run import refuse_other_tokenizer
from exgrpo_fast.config import ConfigError
from exgrpo_fast.core.errors import NumericalStop
from exgrpo_fast.experience.prior.compatibility import fingerprint
from exgrpo_fast.model.folder_reading import PolicyError, load_tokenizer
from exgrpo_fast.rollout.engine import Request, Sampling
from exgrpo_fast.run.checkpoint.format import Checkpoints


def stripped(model_folder: Path, target: Path, names: list[str]) -> Path:
    """A copy of the model whose tokenizer names no such tokens."""
    shutil.copytree(model_folder, target)
    file = target / "tokenizer_config.json"
    file.write_text(
        json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in names})
    )
    (target / "special_tokens_map.json").unlink(missing_ok=True)
    return target


@pytest.mark.parametrize("missing", [[], ["pad_token"]])
def test_padding_is_never_trained(
    tokenizer, make_test_trainer, model_folder: Path, tmp_path: Path, missing: list[str]
) -> None:
    """Prompts and completions of different lengths; no gradient reaches the embedding of the pad."""
    folder = stripped(model_folder, tmp_path / "model", missing)
    loaded = load_tokenizer(str(folder))
    assert (loaded.pad_token_id is None) == bool(missing)
    questions = make_questions(tokenizer, [f"q{'+' * 3 * i}" for i in range(8)])
    trainer = make_test_trainer(questions, function="even_length", model={"name": str(folder)})
    policy = trainer.learner.policy
    trainer.engine = make_transformers_engine(small_config(folder, "right", {}), policy, loaded)
    trainer.collector.fresh.engine = trainer.engine
    groups = [with_rewards(trainer, group, [1.0, 0.0, 1.0, 0.0]) for group in collect(trainer)]
    lengths = {t.num_tokens for group in groups for t in group.trajectories}
    prompts = {len(group.question.prompt_ids) for group in groups}
    assert len(prompts) > 1 and lengths
    recorder = trainer.learner.optimiser = GradientRecorder(policy)
    trainer.learner.update(groups, trainer.objective)
    embedding = recorder.found[0]["model.embed_tokens.weight"]
    used = {i for g in groups for i in g.question.prompt_ids}
    used |= {int(i) for g in groups for t in g.trajectories for i in t.token_ids}
    unused = [i for i in range(len(embedding)) if i not in used]
    pad = tokenizer.pad_token_id
    assert pad in unused and not embedding[unused].any() and embedding[sorted(used)].any()


@pytest.mark.parametrize("missing", [["eos_token"], ["eos_token", "pad_token"]])
def test_a_tokenizer_without_an_end_is_refused_in_one_line(
    model_folder: Path, tmp_path: Path, missing: list[str]
) -> None:
    folder = stripped(model_folder, tmp_path / "model", missing)
    with pytest.raises(PolicyError, match="no eos_token; set one and save it") as caught:
        load_tokenizer(str(folder))
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_said_as_such(tmp_path: Path) -> None:
    """transformers takes it for a hub name with wrong characters."""
    key = "algorithm.distillation.teacher"
    with pytest.raises(PolicyError, match=rf"^{key}: .*/none does not exist$"):
        load_tokenizer(str(tmp_path / "none"), key)


def test_another_tokenizer_than_the_checkpoints_is_refused(tokenizer, tmp_path: Path) -> None:
    origin = {"tokenizer": fingerprint(tokenizer.get_vocab()), "vocabulary_size": len(tokenizer)}
    saved = Checkpoints(tmp_path, origin=origin).save(1, Path.mkdir, {"num_steps": 1})
    refuse_other_tokenizer(saved, tokenizer)
    same_size = {"tokenizer": "0" * 32, "vocabulary_size": len(tokenizer)}
    larger = {"tokenizer": "1" * 32, "vocabulary_size": len(tokenizer) + 1}
    for step, other in ((2, same_size), (3, larger)):
        saved = Checkpoints(tmp_path, origin=other).save(step, Path.mkdir, {"num_steps": step})
        with pytest.raises(ConfigError, match=rf"step_{step} was made with another tokenizer"):
            refuse_other_tokenizer(saved, tokenizer)


# --- weights that are not finite -----------------------------------------------------------------


def test_weights_that_are_not_finite_are_refused_by_name(model_folder: Path) -> None:
    policy = make_policy(small_config(model_folder, "right", {}), str(model_folder), device="cpu")
    refuse_broken_weights(policy, "here")
    with torch.no_grad():
        policy.model.model.norm.weight[3] = float("inf")  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(NumericalStop, match="here: model.norm.weight holds a value that is not"):
        refuse_broken_weights(policy, "here")


def test_the_engine_survives_weights_that_broke_in_a_step(model_folder: Path, tokenizer) -> None:
    """On a GPU an index outside the vocabulary would end the process; the scores refuse the NaN."""
    config = small_config(model_folder, "right", {})
    policy = make_policy(config, str(model_folder), device="cpu")
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.fill_(float("nan"))
    engine = make_transformers_engine(config, policy, tokenizer)
    [completion] = engine.generate([Request((1, 2), 7)], Sampling(4))
    assert completion.logprobs.isnan().all()
    assert completion.token_ids.max() < policy.model.config.vocab_size
