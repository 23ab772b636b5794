"""What the first of two processes holds, as the allocator sees it; the other one is not there.

torch's fake process group stands in for it: gloo would count its own copies as the run's.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from conftest import peak_bytes
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, Qwen2Config

from exgrpo_fast.config import validate
from exgrpo_fast.core.dtensor import local_shard
from exgrpo_fast.core.process_group import Processes, mesh_of
from exgrpo_fast.core.torchrun import RankInfo
from exgrpo_fast.memory.planner import Machine, Planner
from exgrpo_fast.model.lora import add_adapter
from exgrpo_fast.model.packing import sequences_of
from exgrpo_fast.model.sharded_policy import ShardedPolicy
from exgrpo_fast.training.batch import WeightRule
from exgrpo_fast.training.learner import Learner
from exgrpo_fast.training.optim.gradient_release import ReleasingOptimiser
from exgrpo_fast.training.optim.optimiser import Optimiser
from exgrpo_fast.training.preflight import worst_groups
from exgrpo_kernels import PolicyObjective

MODEL = Qwen2Config(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
COUNT, PROMPT, RESPONSE = 2, 32, 128
TOKENS = 2 * (PROMPT + 2 * (RESPONSE - 1))  # a pack: two pairs behind one prompt each
ADAPTER = {"rank": 8, "alpha": 16.0}


def measure(*, releases: bool = False, **keys: Any) -> dict[str, list[float]]:
    """[planned, measured] bytes. `releases`: the gradients, in an update of one pack a rank."""
    config = validate(
        {
            "model": keys,
            "train": {"max_tokens_per_microbatch": TOKENS, "gradient_release": releases},
            "data": {"max_prompt_tokens": PROMPT},
            "rollout": {"max_completion_tokens": RESPONSE},
            "replay": {"enabled": False},
        }
    )
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(MODEL, dtype=torch.float32)
    if "lora" in keys:
        add_adapter(model, **ADAPTER)
    processes = Processes(RankInfo(0, COUNT, 0))
    policy = ShardedPolicy(
        model,
        mesh=mesh_of(processes),
        processes=processes,
        gradient_checkpointing=config.model.gradient_checkpointing,
        tile_tokens=config.tile_tokens,
        max_tokens_per_microbatch=TOKENS,
    )
    kind = ReleasingOptimiser if releases else Optimiser
    learner = Learner(
        policy,
        kind(policy.trainable_parameters, lr=1e-6),
        weights=WeightRule("constant", RESPONSE),
    )
    groups = worst_groups(
        2 * COUNT if releases else 4 * COUNT,  # one pack a rank, and two
        2,
        prompt_tokens=PROMPT,
        completion_tokens=RESPONSE,
        vocabulary=MODEL.vocab_size,
    )
    prompts, responses = sequences_of([t for group in groups for t in group.trajectories])
    learner.update(groups, PolicyObjective())  # the optimiser makes its states here
    of_update = peak_bytes(lambda: learner.update(groups, PolicyObjective()))
    of_scoring = peak_bytes(lambda: policy.score(prompts, responses))
    moments = [m for state in learner.optimiser.adamw.state.values() for m in state.values()]
    kept = sum(local_shard(t).nbytes for t in [*policy.model.parameters(), *moments])
    made = Planner(MODEL, Machine("cpu", None, "vllm_server", COUNT)).plan(config)
    return {
        "kept": [made.states.resident, kept],
        "update": [made.totals["update"], kept + of_update],
        "scoring": [made.totals["scoring"], kept + of_scoring],
    }


def every_case() -> dict[str, Any]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=COUNT)
    found = {
        "checkpointing": measure(),
        "all kept": measure(gradient_checkpointing=False),
        "tiles": measure(tile_tokens=128),
        "adapters": measure(lora=ADAPTER),
        "released": measure(releases=True),
        "released tiles": measure(releases=True, tile_tokens=128),
    }
    dist.destroy_process_group()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(every_case()))
