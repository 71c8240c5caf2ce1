"""Attention of one token per row over blocks in a device pool, indirect through a slot table.

Contract: blocks are visited in ascending id, in chunks that depend on J only, so the result does not depend, to the
bit, on the number of slots or on where a block lies. Slots and ids outside their range are ignored; memory never
written may hold NaN. `update_and_attend` first brings the pool up to date: the missing blocks cross from the host
store, the new token takes its place.
"""

from pallas_kernels.decode_attention.api import decode_attention, update_and_attend
from pallas_kernels.decode_attention.arguments import Residence, Store, Token

__all__ = ["Residence", "Store", "Token", "decode_attention", "update_and_attend"]
