"""How large the packs of an update may be; the config needs it before torch is loaded."""

from __future__ import annotations


def tokens_of_share(total: int, longest: int, ranks: int) -> int:
    """Tokens of a pack, with which sequences of `total` tokens fill no more than one pack a rank.

    A pack is closed when the next sequence, of at most `longest` tokens, does not fit, and the next
    pack may read the prompt again. If `ranks` packs of M were not enough, they alone would hold more
    than ranks x (M - longest) tokens, of at most total + (ranks - 1) x longest.
    """
    even = -(-(total + (ranks - 1) * longest) // ranks)
    return min(total, even + longest)
