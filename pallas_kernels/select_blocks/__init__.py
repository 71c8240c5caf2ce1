"""Block selection per query token and KV head.

Contract: int32 ids, ascending, each at most once, -1 padding at the end, always J wide; ties go to the lowest id.
Scores are compared in float32, NaN and -inf as the lowest number, inf as the largest: none drops a forced block.
"""

from pallas_kernels.select_blocks.api import select_blocks

__all__ = ["select_blocks"]
