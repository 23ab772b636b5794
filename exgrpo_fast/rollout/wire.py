"""Requests and completions as JSON, arrays as base64 of their bytes: between a trainer and a rollout
server, from rank 0 to the others, and in the log of finished rollouts."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exgrpo_fast.core.types import Completion, KeptTokens, WeightSpan
from exgrpo_fast.rollout.engine import Request, Sampling


def pack_requests(requests: Sequence[Request], sampling: Sampling) -> dict[str, Any]:
    return {"requests": [asdict(request) for request in requests], "sampling": asdict(sampling)}


def unpack_requests(body: Mapping[str, Any]) -> tuple[list[Request], Sampling]:
    """KeyError, TypeError or ValueError where the body is none of ours."""
    requests = [
        Request(**{**entry, "prompt_ids": tuple(map(int, entry["prompt_ids"]))})
        for entry in body["requests"]
    ]
    return requests, Sampling(**body["sampling"])


def pack_completion(place: int, completion: Completion) -> dict[str, Any]:
    packed = {
        "place": place,
        "token_ids": _encode(completion.token_ids.numpy().astype("<i4")),
        "logprobs": _encode(completion.logprobs.numpy().astype("<f4")),
        "truncated": completion.truncated,
        "weight_spans": [list(span) for span in completion.weight_spans],
    }
    if completion.kept is not None:
        packed["kept_ids"] = _encode(completion.kept.ids.numpy().astype("<i4"))
        packed["kept_counts"] = _encode(completion.kept.counts.numpy().astype("<i4"))
    if completion.entropies is not None:
        packed["entropies"] = _encode(completion.entropies.numpy().astype("<f4"))
    return packed


def unpack_completion(entry: Mapping[str, Any]) -> tuple[int, Completion]:
    return entry["place"], Completion(
        token_ids=_decode(entry["token_ids"], "<i4").long(),
        logprobs=_decode(entry["logprobs"], "<f4"),
        truncated=entry["truncated"],
        weight_spans=tuple(WeightSpan(*span) for span in entry["weight_spans"]),
        kept=(
            KeptTokens(
                _decode(entry["kept_ids"], "<i4"), _decode(entry["kept_counts"], "<i4").long()
            )
            if "kept_ids" in entry
            else None
        ),
        entropies=_decode(entry["entropies"], "<f4") if "entropies" in entry else None,
    )


def _encode(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _decode(text: str, dtype: str) -> Tensor:
    """int32 or float32."""
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype).astype(dtype[1:]))
