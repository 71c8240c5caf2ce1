"""What the selection reads of a cache."""

from __future__ import annotations

from typing import Any, NamedTuple


class Summaries(NamedTuple):
    """Holds what all layers keep for the selection; a field is None where the variant does not use it.

    pooled_keys: pooled [L, B, K, C, D] and float32 sums [L, B, K, 2, D], see `append_pooled_keys`.
    importance: [L, B, K, M, P] float32, of each token.
    pooled_importance: the same pooled like keys, float32 with D = 1.
    """

    pooled_keys: Any
    importance: Any
    pooled_importance: Any
