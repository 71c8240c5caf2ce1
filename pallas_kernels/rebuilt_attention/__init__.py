"""Attention of one token per row over exact tokens and over chunks of a prompt whose keys are kept as factors.

Contract: a key of a chunk is the product of the factors of its token and of its head, rotated at its position and
rounded to the model's dtype; its value lies in a slot of a pool. Chunks are visited in the order in which they are
listed, in tiles that depend on their number only, so the result does not depend, to the bit, on the number of slots or
on where a chunk lies. Ids and slots outside their range are ignored, negative lengths mean none and
too large ones all that there is room for; memory that nothing listed names may hold NaN.
"""

from pallas_kernels.rebuilt_attention.api import rebuilt_attention
from pallas_kernels.rebuilt_attention.arguments import Chunks, Exact, Factors

__all__ = ["Chunks", "Exact", "Factors", "rebuilt_attention"]
