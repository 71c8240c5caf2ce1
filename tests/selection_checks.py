"""Block selection against the rule in plain Python, for every implementation: settings, and scores that tie."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
from hypothesis import strategies as st

STATIC = ("block_size", "num_selected_blocks", "num_sink_blocks", "num_local_blocks", "num_query_blocks")


def counts(selected, sink, local, query, block_size=4):
    return dict(zip(STATIC, (block_size, selected, sink, local, query), strict=True))


ROWS, HEADS, QUERIES, BLOCKS = 2, 2, 6, 9
# One to three values per array: most draws tie, and some leave fewer scores that are numbers than there are picks.
VALUES = st.lists(
    st.sampled_from([np.float32(x) for x in (-np.inf, -1, 0, 0.25, 1, np.inf, np.nan)]), min_size=1, max_size=3
)


@st.composite
def drawn_inputs(draw):
    kind = draw(st.sampled_from(["nosa", "infllmv2", "dma"]))
    lead = (ROWS, HEADS)
    query, importance = (
        draw(hnp.arrays(np.float32, shape, elements=st.sampled_from(draw(VALUES)), fill=st.nothing()))
        for shape in ((*lead, QUERIES, BLOCKS), (*lead, BLOCKS))
    )
    # Few documents, so that most queries see more blocks than they may select.
    starts = [np.isin(np.arange(BLOCKS), draw(st.sampled_from([(), (3,), (1, 6)]))) for _ in range(ROWS)]
    return {
        "query_scores": None if kind == "dma" else query,
        "importance_scores": None if kind == "infllmv2" else importance,
        "positions": draw(hnp.arrays(np.int32, (ROWS, QUERIES), elements=st.integers(-1, 4 * BLOCKS - 1))),
        "first_block": np.maximum.accumulate(np.where(starts, np.arange(BLOCKS), 0), axis=1).astype(np.int32),
    }


def unneeded_scores_as_nan(case, inputs):
    """NaN for the blocks that are forced or later: what the cache has not written yet, or what is selected anyway."""
    own = inputs["positions"] // case.block_size
    block = np.arange(case.num_blocks)
    never = (block < case.num_sink_blocks) | (block > own[..., None] - case.num_local_blocks)
    return inputs | {
        "query_scores": np.where(never[:, None], np.nan, inputs["query_scores"]),
        "importance_scores": np.where(never.all(1)[:, None], np.nan, inputs["importance_scores"]),
    }
