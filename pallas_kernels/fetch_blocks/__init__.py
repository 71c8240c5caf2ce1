"""Blocks from the host store into slots of the device pool, and full blocks back.

Contract: K and V of a block of one head are one contiguous run and move together; entries out of range move nothing;
when nothing moves, next to nothing is spent.
"""

from pallas_kernels.fetch_blocks.api import fetch_blocks, implementation_of, write_back_blocks

__all__ = ["fetch_blocks", "implementation_of", "write_back_blocks"]
