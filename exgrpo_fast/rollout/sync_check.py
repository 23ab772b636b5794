"""Check that an engine holds the trainer's weights: it samples, the trainer scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.model.packing import Ragged
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.rollout.engine import EngineWrapper, Request, RolloutEngine, Sampling

NUM_TOKENS = 16
NUM_DRAWS = 4  # of the one prompt: an end of sequence may come early in some
# Longer than two blocks of any prefix cache: keys and values of old weights would be seen.
PROMPT_TOKENS = 288
# Mean |log-prob difference|. Measured between vLLM and transformers on random models: 2.5e-6 in
# float32, 0.035 in bfloat16; an update that was not loaded shows as 1e-2 to 1.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.15}


class WeightsOutOfSync(UserError):
    """The engine's log-probs are not those of the trainer's weights."""


class VerifiedEngine(EngineWrapper):
    """An engine whose weights are checked after every update.

    A fixed prompt is continued by the engine under fixed seeds; the trainer scores what it drew.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        policy: Policy,
        *,
        prompt_ids: Sequence[int],
        max_model_len: int,
        tolerance: float,
    ) -> None:
        """`prompt_ids`: any question; it is repeated until it is long enough."""
        self.engine = engine
        self.policy = policy
        self.tolerance = tolerance
        length = min(PROMPT_TOKENS, max_model_len - NUM_TOKENS)
        repeated = list(prompt_ids) * (length // len(prompt_ids) + 1)
        self.requests = [Request(tuple(repeated[:length]), seed) for seed in range(NUM_DRAWS)]
        self.sampling = Sampling(NUM_TOKENS, policy.temperature)

    def sync(self, version: int) -> dict[str, float]:
        """WeightsOutOfSync, with both numbers, where the weights did not arrive."""
        figures = self.engine.sync(version)
        drawn = self.engine.generate(self.requests, self.sampling)
        trainer = self.policy.score(
            Ragged.of([request.prompt_ids for request in self.requests]),
            Ragged.of([completion.token_ids for completion in drawn]),
        ).logprobs.cpu()
        engine = torch.cat([completion.logprobs for completion in drawn])
        gap = float((trainer - engine).abs().mean())
        if not gap <= self.tolerance:
            raise WeightsOutOfSync(
                f"weights out of sync after step {version}: on a fixed prompt the engine's mean "
                f"log-prob is {float(engine.mean()):.6f}, the trainer's "
                f"{float(trainer.mean()):.6f}; they differ by {gap:.2e} a token, "
                f"{self.tolerance:.0e} is allowed (rollout.sync_tolerance)"
            )
        return {**figures, "sync_gap": gap}
