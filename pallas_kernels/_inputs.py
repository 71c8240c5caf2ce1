"""Seeded inputs that look like a model's: neighbouring tokens alike, selections that change little from query to query.

Made with numpy: there is nothing to compile, and the selections do not depend on the ops under test.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Key

from pallas_kernels import blocks

_NEIGHBOURS = 8  # tokens that share most of their content


@dataclasses.dataclass(frozen=True)
class Rows:
    """Shapes of a batch of token rows and the settings of a selection over them."""

    rows: tuple[tuple[int, ...], ...]  # token counts of each row's documents; (0,) is an empty row
    kv_heads: int = 2
    group: int = 4
    dim: int = 64
    dtype: str = "float32"
    queries: int | None = None  # only the last so many places hold queries; None: every place
    block_size: int = 64
    stride: int = 16
    num_selected_blocks: int = 64
    num_sink_blocks: int = 1
    num_local_blocks: int = 17
    num_query_blocks: int = 15

    @property
    def packed(self) -> bool:
        return any(len(row) > 1 for row in self.rows)

    @property
    def tokens(self) -> int:
        """S: the longest row, documents starting on block boundaries."""
        return max(start + length for row in self.rows for start, length in self.documents(row))

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def num_blocks(self) -> int:
        return blocks.num_blocks(self.tokens, self.block_size)

    def documents(self, row: tuple[int, ...]) -> list[tuple[int, int]]:
        """(first token, token count) of each document of a row."""
        starts = np.cumsum([0, *(self.block_size * blocks.num_blocks(n, self.block_size) for n in row[:-1])])
        return list(zip(starts.tolist(), row, strict=True))


def generator(key: Key[Array, ""]) -> np.random.Generator:
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def alike(
    rng: np.random.Generator, shape: tuple[int, ...], axis: int, dtype: str = "float32"
) -> Float[np.ndarray, "..."]:
    """Standard normal numbers whose neighbours along `axis` are correlated."""
    runs = list(shape)
    runs[axis] = -(-shape[axis] // _NEIGHBOURS)
    shared = np.repeat(0.8 * rng.standard_normal(runs, np.float32), _NEIGHBOURS, axis)
    numbers = rng.standard_normal(shape, np.float32)
    numbers *= 0.6  # in place: real sizes are gigabytes
    numbers += shared[tuple(slice(n) for n in shape)]
    return numbers.astype(jnp.dtype(dtype))


def layout(case: Rows) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B M"] | None]:
    """(positions of the queries, first block of each block's document)."""
    positions = np.full((len(case.rows), case.tokens), -1, np.int32)
    first_block = np.zeros((len(case.rows), case.num_blocks), np.int32)
    for b, row in enumerate(case.rows):
        for start, length in case.documents(row):
            positions[b, start : start + length] = np.arange(start, start + length)
            first_block[b, start // case.block_size :] = start // case.block_size
    if case.queries is not None:
        positions = positions[:, -case.queries :]
    return positions, first_block if case.packed else None


def queries(case: Rows, rng: np.random.Generator) -> Float[np.ndarray, "B T N D"]:
    length = case.tokens if case.queries is None else case.queries
    return alike(rng, (len(case.rows), length, case.heads, case.dim), 1, case.dtype)


def selection(
    case: Rows,
    rng: np.random.Generator,
    positions: Int32[np.ndarray, "B T"],
    first_block: Int32[np.ndarray, "B M"] | None,
) -> Int32[np.ndarray, "B K T J"]:
    """Sink, local window, and the best by scores of which most is the same for every query."""
    block = np.arange(case.num_blocks)
    own = np.where(positions >= 0, positions // case.block_size, -1)[..., None]
    first = 0 if first_block is None else np.take_along_axis(first_block, np.maximum(own[..., 0], 0), 1)[..., None]
    visible = (block <= own) & (block >= first)
    forced = visible & ((block - first < case.num_sink_blocks) | (block > own - case.num_local_blocks))
    lead, width = (len(case.rows), case.kv_heads), case.num_blocks
    scores = rng.standard_normal((*lead, 1, width)) + 0.3 * alike(rng, (*lead, positions.shape[1], width), 2)
    scores = np.where(forced[:, None], np.inf, np.where(visible[:, None], scores, -np.inf))
    best = np.argsort(-scores, axis=-1, kind="stable")[..., : case.num_selected_blocks]
    real = np.take_along_axis(scores, best, -1) > -np.inf
    ids = np.sort(np.where(real, best, width), axis=-1)
    pad = [(0, 0)] * 3 + [(0, case.num_selected_blocks - ids.shape[-1])]
    return np.pad(np.where(ids < width, ids, -1), pad, constant_values=-1).astype(np.int32)


def small(kv_heads: int, group: int, dim: int, *rows: tuple[int, ...], **settings) -> Rows:
    """A case for the CPU: blocks of 16 tokens, six of them selected, so that a hundred tokens have a choice."""
    chosen = dict(
        block_size=16, stride=4, num_selected_blocks=6, num_sink_blocks=1, num_local_blocks=2, num_query_blocks=1
    )
    return Rows(rows, kv_heads, group, dim, **(chosen | settings))


# Every K in 1, 2, 4 with every G in 1, 4, 8, 16, and each D with each of them; lengths beside every boundary.
SMALL: dict[str, Rows] = {
    "k1_g1_one_row": small(1, 1, 64, (205,)),
    "k1_g4_short": small(1, 4, 128, (63,)),
    "k1_g8_packed": small(1, 8, 64, (63, 1, 41), (100,)),
    "k1_g16_spans": small(1, 16, 64, (1100,), queries=37),
    "k2_g1_packed": small(2, 1, 128, (40, 100), (16, 16, 80)),
    "k2_g4_ragged": small(2, 4, 64, (205,), (100,), (63,), (0,)),
    "k2_g8_chunk": small(2, 8, 128, (205,), (190,), queries=33),
    "k2_g16_rows": small(2, 16, 128, (63,), (100,)),
    "k4_g1_ragged": small(4, 1, 64, (100,), (0,), (7,)),
    "k4_g4_blocks_of_64": small(4, 4, 128, (205,), block_size=64, stride=16, num_selected_blocks=4),
    "k4_g8_rows": small(4, 8, 64, (63,), (64,)),
    "k4_g16_packed": small(4, 16, 128, (20, 43),),
}  # fmt: skip


def released(tokens: int, *, batch: int = 1, heads: int = 32, queries: int | None = None) -> Rows:
    """The shapes of the released models: 2 KV heads of 128, bfloat16, the default selection."""
    return Rows(((tokens,),) * batch, 2, heads // 2, 128, "bfloat16", queries)


REAL: dict[str, Rows] = {
    "8b_prefill_16k": released(16384),
    "8b_prefill_32k": released(32768),
    "8b_chunk_2k_of_32k": released(32768, queries=2048),
    "8b_train_4x4k": released(4096, batch=4),
    "1b_prefill_16k": released(16384, heads=16),
}
