"""vLLM behind a small interface; the only file that uses its API.

Runs inside the process that calls it, the trainer or a rollout server. The engine is stepped
by hand: requests can be added, and weights replaced, between two steps. Written for vLLM 0.31 to
0.33; where they differ, the installed one is inspected.
"""

from __future__ import annotations

import importlib
import os
import random
import warnings
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.core.text import first_line
from exgrpo_fast.core.types import Completion, KeptTokens, WeightSpan
from exgrpo_fast.rollout.engine import EngineLost, Request, Sampling

# Log-probs asked for beyond top_k: where several logits equal the last one that is kept, vLLM's CPU
# build keeps all of them.
MAX_TIES = 16


class VllmError(UserError):
    """A vLLM that cannot be used here, in one line."""


class VllmModel:
    """A language model in vLLM: requests in, completions out, weights replaced on the way."""

    def __init__(
        self,
        folder: Path | str,
        *,
        eos_token_ids: Sequence[int],
        device: str,
        dtype: str,
        max_model_len: int,
        max_num_seqs: int,
        kv_cache_bytes: int,
        seed: int = 0,
        can_sleep: bool = False,
        tensor_parallel: int = 1,
        top_k: int = 0,
    ) -> None:
        """`folder`: a Hugging Face folder; its tokenizer is never loaded. `kv_cache_bytes`: of one
        GPU. `can_sleep`: memory can be handed back between two generations (CUDA only). `top_k`: the
        largest of any request."""
        self.vllm = _import_vllm()
        machine: dict[str, Any] = {}
        if device == "cpu":
            # A seeded request whose prompt is read in two pieces ends in an error there: the
            # generators of a CPU cannot be set back.
            machine = {
                "enforce_eager": True,
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(max_model_len, 4096),
            }
        self.eos_token_ids = list(eos_token_ids)
        self.max_model_len = max_model_len
        with untouched_random_state(), _refused(str(folder)):
            self.llm: Any = self.vllm.LLM(
                model=str(folder),
                skip_tokenizer_init=True,  # token ids in, token ids out
                trust_remote_code=False,
                generation_config="vllm",  # nothing of the model's own sampling defaults
                dtype=dtype,
                seed=seed % 2**31,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                kv_cache_memory_bytes=kv_cache_bytes,
                logprobs_mode="processed_logprobs",  # of the distribution that was sampled from
                max_logprobs=max(20, top_k + MAX_TIES),  # 20: vLLM's own default
                enable_prefix_caching=True,
                enable_sleep_mode=can_sleep,
                tensor_parallel_size=tensor_parallel,
                disable_log_stats=True,
                use_tqdm_on_load=False,  # one screen, the trainer's
                **machine,
            )
        self.engine: Any = self.llm.llm_engine
        # From 0.32 on a completion has the weight version of each token.
        fields = self.vllm.outputs.CompletionOutput.__dataclass_fields__
        self.reports_versions = "weight_versions" in fields
        # The runner for GPUs scores chosen tokens at chosen rows; the one for CPUs whole prompts.
        self.scores_rows = device == "cuda" and self.reports_versions
        self.cache_block_tokens = int(self.engine.vllm_config.cache_config.block_size)
        self.num_added = 0
        self.running: set[str] = set()
        self.wanted_from: dict[str, int] = {}  # of running scorings: their first wanted token
        self.done: dict[str, Completion | Tensor | None] = {}  # until they are taken
        self.usable = True
        self._stamp(0)

    # --- generation ---

    def add(self, request: Request, sampling: Sampling) -> str:
        """Queue one request; its key comes back with the completion.

        ValueError where it is too long, EngineLost after an update that broke off.
        """
        if not self.usable:
            raise EngineLost("vLLM lost its weights when an update broke off")
        limit = request.limit(sampling)
        if len(request.prompt_ids) + limit > self.max_model_len:
            raise ValueError(
                f"a prompt of {len(request.prompt_ids)} and a completion of {limit} tokens do not "
                f"fit into {self.max_model_len}"
            )
        params = self.vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_tokens=limit,
            seed=request.seed & (2**63 - 1),  # vLLM takes signed 64 bits
            stop_token_ids=self.eos_token_ids,
            logprobs=self._num_logprobs(sampling),
            flat_logprobs=True,
            detokenize=False,
            output_kind=self.vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )
        return self._queue(request.prompt_ids, params)

    def _num_logprobs(self, sampling: Sampling) -> int:
        """The highest ones, beside that of the sampled token: all that are not -inf."""
        if sampling.top_k == 0:
            return 0
        vocabulary = self.engine.vllm_config.model_config.get_vocab_size()
        return min(sampling.top_k + MAX_TIES, vocabulary)

    def add_scoring(self, ids: Sequence[int], first: int, *, read_cache: bool = True) -> str:
        """Queue the log-probabilities, at temperature 1, of `ids[first:]` behind what precedes them.

        What is taken for its key is float32 [len(ids) - first], or None where the prefix cache
        reached so far that their rows were not computed; then ask again without the cache.
        """
        wanted: dict[str, Any] = {"prompt_logprobs": 0, "flat_logprobs": True}
        if self.scores_rows:
            rows = [[token] for token in ids[first:]]
            wanted = {"prompt_logprob_token_ids": rows, "prompt_logprob_start": first - 1}
        params = self.vllm.SamplingParams(
            max_tokens=1,
            temperature=1.0,
            detokenize=False,
            skip_reading_prefix_cache=not read_cache,
            output_kind=self.vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
            **wanted,
        )
        key = self._queue(ids, params)
        self.wanted_from[key] = first
        return key

    def _queue(self, ids: Sequence[int], params: Any) -> str:
        key = str(self.num_added)
        self.num_added += 1
        prompt = self.vllm.TokensPrompt(prompt_token_ids=list(ids))
        (rendered,) = self.engine.renderer.render_cmpl([prompt])
        self.engine.add_request(key, rendered, params)
        self.running.add(key)
        return key

    def step(self) -> None:
        """One token for all running requests; what ends with it waits to be taken."""
        for output in self.engine.step():
            if output.finished:
                key = output.request_id
                self.running.discard(key)
                first = self.wanted_from.pop(key, None)
                self.done[key] = (
                    self._completion(output.outputs[0])
                    if first is None
                    else self._suffix_logprobs(output, first)
                )

    def take(self, keys: Container[str]) -> dict[str, Any]:
        """The results of those keys that are done; each can be taken once."""
        return {key: self.done.pop(key) for key in [k for k in self.done if k in keys]}

    def drop_requests(self, keys: Sequence[str] | None = None) -> None:
        """Forget requests, or all that are queued or running: after an exception the engine would
        hang on them."""
        dropped = set(self.running if keys is None else keys)
        self.engine.abort_request(list(dropped))
        self.running -= dropped
        for key in dropped:
            self.wanted_from.pop(key, None)
            self.done.pop(key, None)

    def _suffix_logprobs(self, output: Any, first: int) -> Tensor | None:
        if self.scores_rows:
            found = output.prompt_token_id_logprobs
            return None if found is None else torch.from_numpy(np.array(found)[:, 0]).float()
        if output.num_cached_tokens and output.num_cached_tokens > first - 1:
            return None  # rows that the cache covers hold memory that nobody has written
        flat = output.prompt_logprobs
        wanted = flat.start_indices[first:]
        return torch.tensor([flat.logprobs[i] for i in wanted], dtype=torch.float32)

    def _completion(self, output: Any) -> Completion:
        flat = output.logprobs
        all_logprobs = torch.tensor(flat.logprobs, dtype=torch.float32)
        logprobs = all_logprobs[torch.tensor(flat.start_indices, dtype=torch.int64)]
        token_ids = torch.tensor(list(output.token_ids), dtype=torch.int64)
        assert len(logprobs) == len(token_ids), "the log-prob of each token"
        return Completion(
            token_ids=token_ids,
            logprobs=logprobs,
            truncated=output.finish_reason == "length",
            weight_spans=self._spans(output, len(token_ids)),
            kept=kept_tokens(flat) if len(all_logprobs) > len(logprobs) else None,
        )

    def _spans(self, output: Any, num_tokens: int) -> tuple[WeightSpan, ...]:
        if not self.reports_versions:
            return (WeightSpan(self.version, 0, num_tokens),)
        return tuple(
            WeightSpan(int(s.version), min(s.start, num_tokens), min(s.end, num_tokens))
            for s in output.weight_versions
        )

    # --- weights ---

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace all weights, by their Hugging Face names, layer after layer.

        Running requests go on with the new weights, their cached keys and values made again.
        EngineLost where it fails: vLLM is then left between two models and cannot be used again.
        """
        if self.running and not self.reports_versions:
            raise RuntimeError("this vLLM does not report the weight version of a token")
        try:
            with untouched_random_state():
                self.llm.collective_rpc(
                    "reload_weights", kwargs={"weights_iterator": iter(weights)}
                )
                self.drop_cache()
                self._stamp(version)
        except Exception as error:
            self.usable = False
            raise EngineLost(
                f"vLLM broke off the update to version {version}: {first_line(error)}"
            ) from error

    def _stamp(self, version: int) -> None:
        self.version = version
        if self.reports_versions:
            self.llm.update_weight_version(str(version))

    def drop_cache(self) -> None:
        """RuntimeError where keys and values of old weights stay."""
        if not self.engine.reset_prefix_cache(reset_running_requests=bool(self.running)):
            raise RuntimeError("the prefix cache was not reset")

    # --- memory ---

    def sleep(self) -> None:
        """Hand back weights and cache; `wake_for_weights`, `load`, `wake_for_requests` follow."""
        self.llm.sleep(level=2)

    def wake_for_weights(self) -> None:
        self.llm.wake_up(tags=["weights"])

    def wake_for_requests(self) -> None:
        self.llm.wake_up(tags=["kv_cache"])

    def close(self) -> None:
        """End the engine; in one process all engines have to end together."""
        with untouched_random_state():
            self.engine.engine_core.shutdown()


def kept_tokens(flat: Any) -> KeptTokens:
    """vLLM's FlatLogprobs, at each position the sampled token and then the highest ones, it maybe among
    them -> the tokens that could be drawn, whose log-prob is not -inf."""
    starts = torch.tensor(flat.start_indices, dtype=torch.int64)
    ids = torch.tensor(flat.token_ids, dtype=torch.int32)
    lengths = torch.tensor(flat.end_indices, dtype=torch.int64) - starts
    owner = torch.arange(len(starts)).repeat_interleave(lengths)
    is_again = ids == ids[starts][owner]
    is_again[starts] = False
    is_kept = (torch.tensor(flat.logprobs) > -torch.inf) & ~is_again
    return KeptTokens(ids[is_kept], owner[is_kept].bincount(minlength=len(starts)))


@contextmanager
def untouched_random_state() -> Iterator[None]:
    """vLLM seeds and draws from the process-wide generators; put them back afterwards."""
    python, numpy_state, torch_state = (
        random.getstate(),
        np.random.get_state(),
        torch.get_rng_state(),
    )
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def _import_vllm() -> Any:
    """The package vllm, configured to stay in this process and off the network."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        with untouched_random_state(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            vllm = importlib.import_module("vllm")
            importlib.import_module("vllm.outputs")
            _ = vllm.LLM  # loaded when it is first asked for
    except (ImportError, RuntimeError, OSError) as error:
        raise VllmError(
            f"rollout.engine vllm: vLLM cannot be imported ({first_line(error)}); "
            f"`exgrpo-fast doctor` says why, --rollout.engine transformers does without"
        ) from None
    return vllm


@contextmanager
def _refused(folder: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise VllmError(f"rollout.engine vllm refuses {folder}: {first_line(error)}") from error
