"""Small arguments that every op takes, and every kernel of it: arrays of zeros and what is static."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels import (
    Chunks,
    Exact,
    Factors,
    Projected,
    Residence,
    Selectable,
    Sizes,
    Store,
    Summaries,
    Token,
)

# Sizes that every kernel takes.
B, T, N, K, S, D, P, M, J, L, C, X = 2, 8, 4, 2, 40, 16, 16, 3, 3, 2, 4, 2
LAYER = jnp.asarray(0, jnp.int32)


# From NumPy: `jnp.zeros` compiles a program per shape, in every process that collects tests.
def floats(*shape):
    return jnp.asarray(np.zeros(shape, np.float32))


def ints(*shape):
    return jnp.asarray(np.zeros(shape, np.int32))


HOST = jax.device_put(floats(L, B * M, K, 2, P, D), jax.memory.Space.Host)
TOKEN = Token(floats(B, N, D), floats(B, K, D), floats(B, K, D))
STORE = Store(floats(L, B, K, J, 2, P, D), HOST, ints(B, M), floats(L, B, K, M, P))
RESIDENCE = Residence(ints(B, K, J), ints(B, K, J), ints(B, K, J))
FACTORS = Factors(floats(L, B, M, C, 3), floats(L, B, K, 3, D), floats(M * C, D // 2), floats(M * C, D // 2))
CHUNKS = Chunks(floats(L, B, K, J, 1, C, D), ints(B, K, J), ints(B, K, J))
EXACT = Exact(floats(L, B, K, 2, S, D), ints(B))

# For each op: array arguments that are right, static arguments.
CALLS = {
    "block_attention": (
        {
            "q": floats(B, T, N, D), "k": floats(B, K, S, D), "v": floats(B, K, S, D), "bias": floats(B, K, S),
            "block_ids": ints(B, K, T, J), "positions": jnp.arange(B * T, dtype=jnp.int32).reshape(B, T),
        },
        {"block_size": P},
    ),
    "block_scores": (
        {"q": floats(B, T, N, D), "pooled_keys": floats(B, K, C, D), "positions": ints(B, T)},
        {"num_blocks": M, "block_size": P, "stride": 8},
    ),
    "select_blocks": (
        {"query_scores": floats(B, K, T, M), "importance_scores": floats(B, K, M), "positions": ints(B, T)},
        {"block_size": P, "num_selected_blocks": J, "num_sink_blocks": 1, "num_local_blocks": 1, "num_query_blocks": 1},
    ),
    "pool_keys": ({"keys": floats(B, K, S, D)}, {"stride": 2}),
    "append_pooled_keys": (
        {
            "pooled": floats(L, B, K, C, D), "sums": floats(L, B, K, 2, D), "new": floats(B, K, 1, D),
            "start": ints(B), "count": ints(B), "layer": LAYER,
        },
        {"stride": 2},
    ),
    "append_token": (
        {
            "qkv": floats(B, K, N // K + 2, D), "cos": floats(B, D // 2), "sin": floats(B, D // 2),
            "scale": floats(L, K), "delta": floats(L, K, D, K),
            "summaries": Summaries(
                (floats(L, B, K, C, D), floats(L, B, K, 2, D)), floats(L, B, K, M, P),
                (floats(L, B, K, C, 1), floats(L, B, K, 2, 1)),
            ),
            "positions": ints(B), "layer": LAYER,
        },
        {"stride": 2},
    ),
    "append_and_select": (
        {
            "projected": Projected(floats(B, K, N // K + 2, D), floats(B, D // 2), floats(B, D // 2)),
            "selectable": Selectable(
                Summaries(
                    (floats(L, B, K, M * P // 8 - 1, D), floats(L, B, K, 2, D)), floats(L, B, K, M, P),
                    (floats(L, B, K, M * P // 8 - 1, 1), floats(L, B, K, 2, 1)),
                ),
                floats(L, K), floats(L, K, D, K), (ints(L, B, K, J), ints(L, B, K, J)),
            ),
            "positions": ints(B), "layer": LAYER,
        },
        {"sizes": Sizes(M, P, 8, J, 1, 1, 1)},
    ),
    "rms_norm": ({"x": floats(B, D), "weight": floats(L, D), "layer": LAYER}, {"eps": 1e-5}),
    "decode_attention": (
        {
            "q": floats(B, N, D), "pool": floats(L, B, K, J, 2, P, D), "bias": floats(L, B, K, M, P),
            "slots": ints(B, K, J), "block_ids": ints(B, K, J), "positions": ints(B), "layer": LAYER,
        },
        {},
    ),
    "update_and_attend": (
        {
            "token": TOKEN, "store": STORE, "residence": RESIDENCE, "positions": ints(B), "layer": LAYER,
        },
        {},
    ),
    "rebuilt_attention": (
        {
            "q": floats(B, N, D), "factors": FACTORS, "chunks": CHUNKS, "exact": EXACT, "layer": LAYER,
        },
        {},
    ),
    "resolve_slots": (
        {
            "blocks": ints(L, B, K, J), "last_used": ints(L, B, K, J), "wanted": ints(B, K, J), "step": ints(B),
            "layer": LAYER,
        },
        {},
    ),
    "fetch_blocks": (
        {
            "pool": floats(L, B, K, J, 2, P, D), "host": HOST, "page_table": ints(B, M),
            "block_ids": ints(B, K, X), "slots": ints(B, K, X), "layer": LAYER,
        },
        {},
    ),
    "write_back_blocks": (
        {
            "host": HOST, "pool": floats(L, B, K, J, 2, P, D), "page_table": ints(B, M),
            "block_ids": ints(L, B, K, X), "slots": ints(L, B, K, X),
        },
        {},
    ),
}  # fmt: skip


def call(name, implementation="xla", **changes):
    """What would run, as text; nothing does. changes: of arguments, arrays or static."""
    arrays, static = ({n: changes.get(n, x) for n, x in given.items()} for given in CALLS[name])
    static |= {n: x for n, x in changes.items() if isinstance(x, str)}
    arrays |= {n: x for n, x in changes.items() if n not in static}
    run = lambda arrays: getattr(pallas_kernels, name)(**arrays, **static, implementation=implementation)
    return str(jax.make_jaxpr(run)(arrays))
