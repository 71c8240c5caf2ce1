"""Attention with rebuilt keys as the definition reads: token by token in NumPy, in float64."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from pallas_kernels.rebuilt_attention.arguments import Chunks, Exact, Factors


def rebuilt_attention_ref(
    q: Float[np.ndarray, "B N D"],
    factors: Factors,
    chunks: Chunks,
    exact: Exact,
    layer: int,
    *,
    scale: float | None = None,
) -> Float[np.ndarray, "B N D"]:
    """Of NumPy arrays; rebuilt keys are rounded to the dtype of the factors, as they are by the op."""
    _, heads, dim = q.shape
    num_slots, size = chunks.pool.shape[3], chunks.pool.shape[5]
    scale, layer = dim**-0.5 if scale is None else scale, int(layer)
    wide = lambda x: np.asarray(x, np.float64)
    out = np.zeros(q.shape)
    for b, head in np.ndindex(*chunks.ids.shape[:2]):
        keys, values = [], []
        for i in range(min(int(exact.lengths[b]), exact.tokens.shape[4])):
            keys.append(wide(exact.tokens[layer, b, head, 0, i]))
            values.append(wide(exact.tokens[layer, b, head, 1, i]))
        for chunk, slot in zip(chunks.ids[b, head].tolist(), chunks.slots[b, head].tolist(), strict=True):
            if not (0 <= chunk < factors.tokens.shape[2] and 0 <= slot < num_slots):
                continue
            for t in range(size):
                key = wide(factors.tokens[layer, b, chunk, t]) @ wide(factors.heads[layer, b, head])
                at = min(chunk * size + t, len(factors.cos) - 1)
                cos, sin, (first, second) = wide(factors.cos[at]), wide(factors.sin[at]), np.split(key, 2)
                key = np.concatenate([first * cos - second * sin, second * cos + first * sin])
                keys.append(wide(key.astype(factors.heads.dtype)))
                values.append(wide(chunks.pool[layer, b, head, slot, 0, t]))
        group = heads // chunks.ids.shape[1]
        for n in range(head * group, (head + 1) * group) if keys else ():
            logits = np.stack(keys) @ wide(q[b, n]) * scale
            weights = np.exp(logits - logits.max())
            out[b, n] = weights @ np.stack(values) / weights.sum()
    return out.astype(q.dtype)
