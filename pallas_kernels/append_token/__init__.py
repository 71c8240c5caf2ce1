"""One new token per row, before it attends: its rotation, its importance, and what the selection will read of it.

Contract: queries and keys are rotated in float32 and rounded once; the running means of keys and importance come out as
`append_pooled_keys` makes them; rows without a token stay as they are. `append_summaries`: of many tokens, in XLA.
"""

from pallas_kernels.append_token.api import append_summaries, append_token
from pallas_kernels.append_token.summaries import Summaries

__all__ = ["Summaries", "append_summaries", "append_token"]
