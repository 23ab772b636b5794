"""Rollouts on a vLLM server started by others: for evaluation only, it takes no weights.

Token ids go to `/completions` and come back from it (`return_token_ids`), so nothing is tokenised
twice. Each completion is one request: prompts that share one would share its seed, and
`n` completions of a prompt have neighbouring seeds.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.core.http_client import Endpoint, EndpointError
from exgrpo_fast.core.types import Completion
from exgrpo_fast.rollout.engine import (
    UNOBSERVED,
    EngineLost,
    LocalEngine,
    Observer,
    Request,
    Sampling,
)

if TYPE_CHECKING:
    import httpx2

MAX_BODY_BYTES = 64 << 20  # 32k tokens with their log-probs take about 5
MAX_CONCURRENCY = 128  # no faster above it; vLLM queues what it cannot run side by side
BEAT_SECONDS = 0.02
ADVICE = {400: "it does not take token ids, or these are none of its model's"}


class EndpointEngine(LocalEngine):
    """A model behind the OpenAI-compatible routes of vLLM."""

    def __init__(
        self,
        base_url: str,
        *,
        eos_token_ids: Sequence[int],
        model: str | None = None,
        api_key_env: str | None = None,
        timeout_seconds: float = 600.0,
        retries: int = 3,
        backoff_seconds: float = 1.0,
        max_concurrency: int = MAX_CONCURRENCY,
    ) -> None:
        """`model`: by the server's name for it; None: the only one. `timeout_seconds`: for a whole
        completion. UserError or EngineLost, in one line, where the server cannot be used."""
        try:
            self.endpoint = Endpoint(
                base_url,
                api_key_env=api_key_env,
                timeout_seconds=timeout_seconds,
                retries=retries,
                backoff_seconds=backoff_seconds,
                max_body_bytes=MAX_BODY_BYTES,
                advice=ADVICE,
            )
        except EndpointError as error:
            raise UserError(f"endpoint: {error}") from None
        self.eos_token_ids = list(eos_token_ids)
        self.max_concurrency = max_concurrency
        self.model, self.max_model_len = choose_model(asyncio.run(self._served()), model, base_url)

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        observer: Observer = UNOBSERVED,
    ) -> list[Completion]:
        """EngineLost where a completion fails. Log-probs are the server's own: before
        temperature, unless it was started with --logprobs-mode processed_logprobs."""
        longest = max((len(r.prompt_ids) + r.limit(sampling) for r in requests), default=0)
        if self.max_model_len is not None and longest > self.max_model_len:
            raise UserError(
                f"endpoint {self.endpoint.base_url}: a prompt with its completion may take "
                f"{longest} tokens, and the server allows {self.max_model_len} (its "
                f"--max-model-len); lower --max-completion-tokens"
            )
        return asyncio.run(self._generate(requests, sampling, observer))

    def sync(self, version: int) -> NoReturn:
        """It cannot."""
        raise UserError(
            f"endpoint {self.endpoint.base_url}: a plain vLLM server takes no weights; to train, "
            f"use rollout.engine vllm_server"
        )

    async def _served(self) -> dict[str, int | None]:
        async with self.endpoint.client() as client:
            try:
                return await self.endpoint.ask(
                    client, "/models", read_models, expected="list of models"
                )
            except EndpointError as error:
                raise self._lost(error) from None

    async def _generate(
        self, requests: Sequence[Request], sampling: Sampling, observer: Observer
    ) -> list[Completion]:
        completions: dict[int, Completion] = {}
        places = iter(range(len(requests)))

        async def work(client: httpx2.AsyncClient) -> None:
            for place in places:  # each worker takes the next one
                completions[place] = await self._complete(client, requests[place], sampling)
                observer.finished([place], [completions[place]])

        async def beat() -> None:
            while True:
                observer.on_poll()
                await asyncio.sleep(BEAT_SECONDS)

        async with self.endpoint.client() as client:
            beating = asyncio.create_task(beat())
            workers = [work(client) for _ in range(min(self.max_concurrency, len(requests)))]
            try:
                await asyncio.gather(*workers)  # the others end with this loop when one fails
            finally:
                beating.cancel()
        return [completions[i] for i in range(len(requests))]

    async def _complete(
        self, client: httpx2.AsyncClient, request: Request, sampling: Sampling
    ) -> Completion:
        body = {
            "model": self.model,
            "prompt": list(request.prompt_ids),
            "seed": request.seed & (2**63 - 1),  # vLLM takes signed 64 bits
            "max_tokens": request.limit(sampling),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            **NEUTRAL,
            "stop_token_ids": self.eos_token_ids,
            "logprobs": 0,  # of the sampled token alone
            "return_token_ids": True,
        }
        try:
            return await self.endpoint.ask(
                client,
                "/completions",
                read_completion,
                payload=lambda: body,
                expected="token ids with their log-probs: it has to be vLLM (return_token_ids)",
            )
        except EndpointError as error:
            raise self._lost(error) from None

    def _lost(self, error: EndpointError) -> EngineLost:
        return EngineLost(f"endpoint {self.endpoint.base_url}: {error}")


# Otherwise a server takes them from the model's generation config.
NEUTRAL = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


def choose_model(
    served: dict[str, int | None], asked: str | None, base_url: str
) -> tuple[str, int | None]:
    """Name and longest sequence of the model to ask; UserError where there is a choice to make."""
    names = ", ".join(served) or "none"
    if asked is None and len(served) != 1:
        raise UserError(f"--endpoint-model: {base_url} serves {names}; name one of them")
    name = next(iter(served)) if asked is None else asked
    if name not in served:
        raise UserError(f"--endpoint-model {name}: {base_url} serves {names}")
    return name, served[name]


def read_models(body: bytes) -> dict[str, int | None] | None:
    """A list of models -> name: longest sequence, None where the server does not say."""
    try:
        listed = json.loads(body)["data"]
        return {str(entry["id"]): _whole(entry.get("max_model_len")) for entry in listed}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def read_completion(body: bytes) -> Completion | None:
    """The one choice of a completion; None where ids or log-probs are missing or do not match."""
    try:
        (choice,) = json.loads(body)["choices"]
        token_ids = torch.tensor(choice["token_ids"], dtype=torch.int64)
        logprobs = torch.tensor(choice["logprobs"]["token_logprobs"], dtype=torch.float32)
        truncated = {"length": True, "stop": False}[choice["finish_reason"]]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    if token_ids.shape != logprobs.shape or token_ids.dim() != 1 or not len(token_ids):
        return None
    return Completion(token_ids, logprobs, truncated)
