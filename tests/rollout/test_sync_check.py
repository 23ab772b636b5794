"""The check of an engine's weights on an engine that shares the trainer's weights, and on ones that do not."""

from __future__ import annotations

import copy

import pytest
import torch
from vllm_cases import train_a_little

from exgrpo_fast.model.packing import Ragged
from exgrpo_fast.model.policy import Policy, load_model
from exgrpo_fast.rollout.engine import Request, Sampling
from exgrpo_fast.rollout.hf.engine import TransformersEngine
from exgrpo_fast.rollout.sync_check import (
    NUM_TOKENS,
    PROMPT_TOKENS,
    VerifiedEngine,
    WeightsOutOfSync,
)


class CopiedEngine(TransformersEngine):
    """A copy of the policy that takes new weights over only when it is told to."""

    def __init__(self, policy: Policy, *, deaf: bool = False) -> None:
        own = Policy(copy.deepcopy(policy.model), temperature=policy.temperature)
        super().__init__(own, eos_token_ids=[1], pad_token_id=0)
        self.trainer, self.deaf = policy, deaf

    def sync(self, version: int) -> dict[str, float]:
        if not self.deaf:
            self.policy.model.load_state_dict(dict(self.trainer.named_weights()))
        return {"seconds": 1.0}


@pytest.fixture
def policy(model_folder) -> Policy:
    return Policy(load_model(str(model_folder)), temperature=0.8)


def verified(policy: Policy, *, deaf: bool, max_model_len: int = 512) -> VerifiedEngine:
    return VerifiedEngine(
        CopiedEngine(policy, deaf=deaf),
        policy,
        prompt_ids=[5, 6, 7],
        max_model_len=max_model_len,
        tolerance=1e-4,
    )


def test_an_update_that_arrives_is_reported(policy) -> None:
    engine = verified(policy, deaf=False)
    for version in (1, 2):
        train_a_little(policy)
        figures = engine.sync(version)
        assert figures["sync_gap"] < 1e-5 and figures["seconds"] == 1.0


def test_an_update_that_does_not_arrive_stops_with_both_numbers(policy) -> None:
    engine = verified(policy, deaf=True)
    engine.sync(0)
    drawn = engine.generate(engine.requests, engine.sampling)
    train_a_little(policy)
    scored = policy.score(
        Ragged.of([r.prompt_ids for r in engine.requests]),
        Ragged.of([c.token_ids for c in drawn]),
    )
    with pytest.raises(WeightsOutOfSync) as found:
        engine.sync(1)
    said = str(found.value)
    assert "after step 1" in said and "rollout.sync_tolerance" in said
    assert f"{float(torch.cat([c.logprobs for c in drawn]).mean()):.6f}" in said
    assert f"{float(scored.logprobs.mean()):.6f}" in said


def test_what_is_not_a_number_is_out_of_sync(policy) -> None:
    engine = verified(policy, deaf=True)
    with torch.no_grad():
        policy.model.get_output_embeddings().weight[3, 0] = torch.nan
    with pytest.raises(WeightsOutOfSync, match="nan"):
        engine.sync(1)


def test_the_prompt_is_long_enough_for_any_cache_and_fits_the_model(policy) -> None:
    assert len(verified(policy, deaf=False).requests[0].prompt_ids) == PROMPT_TOKENS
    short = verified(policy, deaf=False, max_model_len=40).requests[0]
    assert len(short.prompt_ids) == 40 - NUM_TOKENS and short.prompt_ids[:4] == (5, 6, 7, 5)


def test_requests_pass_through(policy) -> None:
    engine = verified(policy, deaf=False)
    request = Request((5, 6), 9)
    (one,) = engine.generate([request], Sampling(6))
    (same,) = engine.start([request], Sampling(6)).wait()
    assert one.token_ids.tolist() == same.token_ids.tolist()
    engine.on_update_start()
    engine.close()
