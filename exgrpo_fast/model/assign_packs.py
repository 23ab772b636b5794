"""Which process works on which packs.

The collectives of a sharded model are part of every forward and backward pass, so all processes
make the same number of passes. One that has fewer packs than others makes up for it with a pass
over the smallest pack, whose tokens weigh nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from exgrpo_fast.model.packing import Dealt, Pack


def deal(packs: Sequence[Pack], *, rank: int, count: int) -> list[Dealt]:
    """The packs of process `rank` of `count`, largest first.

    Every pack goes to the process with the fewest read tokens so far (longest processing time
    first: Graham 1969 bounds the longest share by 4/3 of the best one).
    """
    shares: list[list[Pack]] = [[] for _ in range(count)]
    loads = [0] * count
    for pack in sorted(packs, key=lambda pack: -len(pack.input_ids)):
        least = loads.index(min(loads))
        shares[least].append(pack)
        loads[least] += len(pack.input_ids)
    num_passes = max(len(share) for share in shares)
    smallest = min(packs, key=lambda pack: len(pack.input_ids), default=None)
    own = [Dealt(pack, True) for pack in shares[rank]]
    if smallest is not None:
        own += [Dealt(smallest, False)] * (num_passes - len(own))
    return own
