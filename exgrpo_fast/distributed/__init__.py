"""One run on several processes, each with a part of the weights and of every batch.

sharding   the model in parts (FSDP2), its head put together once for all passes of an update
dealing    which process works on which packs
policy     the policy of one process among several
rollouts   the first process generates for all; the others help it to send the weights
saving     the first process writes the model, which all put together; each its part of the moments
"""

from exgrpo_fast.distributed.policy import ShardedPolicy, host_mesh, mesh_of
from exgrpo_fast.distributed.rollouts import AnnouncedPolicy, CopiedEngine, SharedEngine
from exgrpo_fast.distributed.saving import NoBadBatches, NoCompletionLog, SharedCheckpointWriter

__all__ = [
    "AnnouncedPolicy",
    "SharedCheckpointWriter",
    "CopiedEngine",
    "NoBadBatches",
    "NoCompletionLog",
    "ShardedPolicy",
    "SharedEngine",
    "host_mesh",
    "mesh_of",
]
