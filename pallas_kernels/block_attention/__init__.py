"""Attention of many queries over the blocks that each selected: training, prefill, and dense attention without ids.

Contract: block ids are int32 in any order without repeats; ids outside [0, M) are ignored. Positions ascend strictly
along a row, apart from -1 for padding; None means 0, 1, 2 and so on. Logits and accumulation are float32 (float64 for
float64 inputs). A query that sees no token gets output 0 and lse -inf. NaN in tokens that no query of the batch row
sees does not spread, nor does NaN in a query that sees no token or in its gradients.
"""

from pallas_kernels.block_attention.api import block_attention

__all__ = ["block_attention"]
