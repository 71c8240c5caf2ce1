"""RMS normalisation by the weights of one layer among those of all, read where they lie.

Contract: float32 throughout, rounded once. XLA would copy the slice of a stack that its kernels read.
"""

from pallas_kernels.rms_norm.api import rms_norm

__all__ = ["rms_norm"]
