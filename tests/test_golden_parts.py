"""The parts of the model against the published reference code (see golden/README.md), one by one."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nosa_jax import rope
from nosa_jax.attention.selection import importance_block_scores
from nosa_jax.config import RopeConfig
from nosa_jax.hf import from_pretrained
from pallas_kernels import block_attention, block_scores, blocks, pool_keys, select_blocks
from pallas_kernels.block_scores.reference import window_scores
from pallas_kernels.formulas import rms_norm

GOLDEN = Path(__file__).parent / "golden"
# Of select_*: total, sink, local and query blocks, and the length. The reference counts the own block and the pick of
# the sink differently (see golden/README.md).
SELECT = {
    "p1500": (8, 1, 3, 1, 1500),
    "p1500b": (12, 2, 5, 2, 1500),
    "d1500": (8, 1, 3, 1, 1500),
    "d1000": (64, 1, 17, 15, 1000),
    "d4097": (64, 1, 17, 15, 4097),
    "d5000": (64, 1, 17, 15, 5000),
    "d8192": (64, 1, 17, 15, 8192),
}


def read(case: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "cases" / f"{case}.npz") as file:
        return dict(file)


def close_where_finite(ours, theirs, atol: float) -> None:
    """The reference writes +inf for forced blocks and -inf where there is no window."""
    finite = np.isfinite(theirs)
    np.testing.assert_allclose(np.asarray(ours)[finite], theirs[finite], rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["tiny_g4", "tiny_g16"])
def test_rope_to_the_bit(name):
    arrays = read(f"rope_{name}")
    dim = arrays["cos"].shape[1]
    frequencies = rope.inverse_frequencies(RopeConfig(theta=10000.0), dim, 16384)
    np.testing.assert_array_equal(frequencies, arrays["inv_freq"])
    positions = jnp.asarray(arrays["positions"], jnp.int32)[None]
    cos, sin = rope.cos_sin(positions, RopeConfig(theta=10000.0), dim, 16384)
    # The angles are equal to the bit; cos and sin of them are each library's own.
    np.testing.assert_allclose(cos[0], arrays["cos"][:, : dim // 2], rtol=0, atol=1.2e-7)
    np.testing.assert_allclose(sin[0], arrays["sin"][:, : dim // 2], rtol=0, atol=1.2e-7)


@pytest.fixture(scope="module", params=["g4_red_1500", "g16_red_1500"])
def first_layer(request):
    """Golden arrays of layer 0 and our projections of the same prompt."""
    arrays = read(request.param)
    model = from_pretrained(GOLDEN / "models" / request.param.replace("g", "tiny_g").split("_red")[0])
    layer = jax.tree.map(lambda x: x[0], model.layers)
    positions = jnp.arange(1500, dtype=jnp.int32)[None]
    x = model.embed[...][jnp.asarray(arrays["input_ids"])]
    x = rms_norm(x, layer.attention_norm[...], model.config.rms_norm_eps)
    return arrays, layer.attention.project(model.config, x, *rope.of_positions(model.config, positions)), positions


def test_importance(first_layer):
    arrays, ours, _ = first_layer
    np.testing.assert_allclose(ours.importance[0].T, arrays["L0.cis"], rtol=0, atol=1e-5)
    pooled = pool_keys(ours.importance[..., None], stride=16)[..., 0]
    scores = importance_block_scores(pooled, None, num_blocks=24, ratio=4)
    theirs = arrays["L0.pool_cis"][0]
    close_where_finite(np.broadcast_to(scores[0][:, None], theirs.shape), theirs, 1e-5)


def test_scores_of_windows_and_blocks(first_layer):
    arrays, ours, positions = first_layer
    pooled = pool_keys(ours.k, stride=16)
    np.testing.assert_allclose(pooled[0].swapaxes(0, 1), arrays["L0.compressed_k"], rtol=0, atol=1e-5)
    at = arrays["positions"][0]
    q, positions = ours.q[:, at], positions[:, at]
    windows = window_scores(q, pooled, positions, block_size=64, stride=16)
    np.testing.assert_allclose(windows, arrays["L0.stage1"], rtol=0, atol=1e-5)
    scores = block_scores(q, pooled, positions, num_blocks=24, block_size=64, stride=16)
    close_where_finite(scores, arrays["L0.pool_q"], 1e-5)


def test_attention_over_the_reference_selection(first_layer):
    arrays, ours, positions = first_layer
    at = arrays["positions"][0]
    ids = jnp.asarray(arrays["L0.topk_idx"], jnp.int32)
    out, _ = block_attention(ours.q[:, at], ours.k, ours.v, ours.importance, ids, positions[:, at], block_size=64)
    np.testing.assert_allclose(out.reshape(1, len(at), -1), arrays["L0.attn_out"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", SELECT)
@pytest.mark.parametrize("variant", ["nosa", "infllmv2"])
def test_selection_from_given_scores(variant, config):
    total, sink, local, query, length = SELECT[config]
    arrays = read(f"select_{variant}")
    num_blocks = -(-length // 64)
    for draw in sorted({name.split(".")[0] for name in arrays if name.split(".")[0].rsplit("_", 1)[0] == config}):
        case = {name.split(".")[1]: array for name, array in arrays.items() if name.split(".")[0] == draw}
        positions = case["rows"] if config.startswith("p") else np.array([length - 1])
        windows = jnp.asarray(case["stage1"])[None]
        scores = blocks.pool_windows_to_blocks(windows, None, blocks=num_blocks, ratio=4)
        close_where_finite(scores[0], case["pool_q"], 0)
        fill = None
        if variant == "nosa":
            importance = jnp.asarray(case["cis"]).T[None, :, :, None]
            fill = importance_block_scores(
                pool_keys(importance, stride=16)[..., 0], None, num_blocks=num_blocks, ratio=4
            )
            theirs = case["pool_cis"]
            close_where_finite(np.broadcast_to(fill[0][:, None], theirs.shape), theirs, 1e-6)
            # The reference's own sums decide, so that rounding cannot.
            fill = jnp.where(jnp.isfinite(theirs[:, -1]), theirs[:, -1], fill[0])[None]
        ids = select_blocks(
            scores,
            fill,
            jnp.asarray(positions, jnp.int32)[None],
            block_size=64,
            num_selected_blocks=total,
            num_sink_blocks=sink,
            num_local_blocks=local,
            num_query_blocks=query,
        )[0]
        assert ids.shape == (2, len(positions), total)
        width = case["topk_idx"].shape[-1]
        np.testing.assert_array_equal(np.asarray(ids)[..., :width], case["topk_idx"])
        assert np.all(np.asarray(ids)[..., width:] == -1)
