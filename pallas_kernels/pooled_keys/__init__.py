"""Mean-pooled keys, whole (`pool_keys`) and incremental (`append_pooled_keys`).

Contract: window c is the mean of keys stride*c .. stride*c + 2*stride - 1, added in float32 in token order and rounded
once. Importance is pooled by the same functions with D = 1.
"""

from pallas_kernels.pooled_keys.api import append_pooled_keys, pool_keys

__all__ = ["append_pooled_keys", "pool_keys"]
