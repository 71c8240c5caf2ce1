"""The ops of NOSA attention. Each takes `implementation=` and has a slow twin, `<op>_ref`, in its `reference` module.

OPS has every op by name, with what runs it and why something cannot; IMPLEMENTATIONS are the names that
`implementation=` takes, in the order in which "auto" tries them.
"""

from pallas_kernels._dispatch import IMPLEMENTATIONS, OPS, KernelUnsupportedError, Op
from pallas_kernels.append_and_select import Projected, Selectable, Sizes, append_and_select
from pallas_kernels.append_token import Summaries, append_summaries, append_token
from pallas_kernels.block_attention import block_attention
from pallas_kernels.block_scores import block_scores
from pallas_kernels.decode_attention import Residence, Store, Token, decode_attention, update_and_attend
from pallas_kernels.fetch_blocks import fetch_blocks, write_back_blocks
from pallas_kernels.pooled_keys import append_pooled_keys, pool_keys
from pallas_kernels.rebuilt_attention import Chunks, Exact, Factors, rebuilt_attention
from pallas_kernels.resolve_slots import Resolved, resolve_slots
from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.select_blocks import select_blocks

__all__ = [
    "IMPLEMENTATIONS",
    "OPS",
    "Chunks",
    "Exact",
    "Factors",
    "KernelUnsupportedError",
    "Op",
    "Projected",
    "Residence",
    "Resolved",
    "Selectable",
    "Sizes",
    "Store",
    "Summaries",
    "Token",
    "append_and_select",
    "append_pooled_keys",
    "append_summaries",
    "append_token",
    "block_attention",
    "block_scores",
    "decode_attention",
    "fetch_blocks",
    "pool_keys",
    "rebuilt_attention",
    "resolve_slots",
    "rms_norm",
    "select_blocks",
    "update_and_attend",
    "write_back_blocks",
]
