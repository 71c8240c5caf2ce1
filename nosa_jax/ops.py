"""The kernels, under the one import name that users type."""

from pallas_kernels import *  # noqa: F403
from pallas_kernels import __all__ as __all__
