"""What travels between a trainer and a rollout server: JSON, with arrays as base64 of their bytes."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

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
    return packed


def unpack_completion(entry: Mapping[str, Any]) -> tuple[int, Completion]:
    return entry["place"], Completion(
        token_ids=torch.from_numpy(_decode(entry["token_ids"], "<i4").astype(np.int64)),
        logprobs=torch.from_numpy(_decode(entry["logprobs"], "<f4").astype(np.float32)),
        truncated=entry["truncated"],
        weight_spans=tuple(WeightSpan(*span) for span in entry["weight_spans"]),
        kept=_unpack_kept(entry) if "kept_ids" in entry else None,
    )


def _unpack_kept(entry: Mapping[str, Any]) -> KeptTokens:
    ids, counts = (_decode(entry[name], "<i4") for name in ("kept_ids", "kept_counts"))
    return KeptTokens(
        torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(counts.astype(np.int64))
    )


def _encode(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _decode(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)
