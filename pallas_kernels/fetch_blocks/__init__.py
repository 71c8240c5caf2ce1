"""Blocks from the host store into a pool on the device, and back: all that ever crosses the link of a cache.

The store is cut into pages, each of which holds one block of one row, all KV heads of it; `page_table` says which block
lies in which page, the same in all layers. Its numbers count modulo the pages of the store, so that a table of a whole
batch serves a device that has an even part of the rows and of the pages, too. A pool has slots, of all layers or of one
layer alone, such as a layer that is staged on the device while a prompt is read.

Contract: the parts of a block of one head, K and V or V alone, are one contiguous run and move together, 16 bytes at a
time; entries out of range, and blocks without a page, move nothing; when nothing moves, next to nothing is spent.
"""

from pallas_kernels.fetch_blocks.api import fetch_blocks, implementation_of, write_back_blocks

__all__ = ["fetch_blocks", "implementation_of", "write_back_blocks"]
