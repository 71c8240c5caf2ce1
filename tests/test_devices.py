"""Rows split over devices: four of the CPU's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_GENERATE = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from support import lively_model, random_tokens, small_config
import nosa_jax
from nosa_jax import CacheConfig, Sampling

tokens, lengths = random_tokens(8, 70, seed=1), np.array([70, 64, 33, 1, 69, 48, 70, 20])
sampled = {"sampling": Sampling(temperature=1.0), "key": jax.random.key(3), "stop_tokens": range(9)}
for axes, variant in (((2, 2), "nosa"), ((4,), "full")):
    mesh = jax.make_mesh(axes, ("rows", "more")[: len(axes)])
    cache = CacheConfig(slots=8) if variant == "nosa" else CacheConfig()
    model = nosa_jax.with_attention(lively_model(small_config()), variant=variant)
    run = lambda model, **more: nosa_jax.generate(
        model, tokens, lengths, max_new_tokens=12, cache=cache, record=True, **sampled, **more
    )
    alone = run(model)
    placed = jax.device_put(model, NamedSharding(mesh, PartitionSpec()))
    shared = run(placed, mesh=mesh)
    assert len(shared.tokens.sharding.device_set) == 4
    assert len(set(np.asarray(alone.lengths).tolist())) > 1
    for name in ("tokens", "lengths", "block_ids", "fetched"):
        ours, theirs = getattr(shared, name), getattr(alone, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
    np.testing.assert_allclose(shared.logits, alone.logits, rtol=0, atol=1e-4)
try:
    nosa_jax.generate(model, tokens[:6], mesh=mesh)
except ValueError as error:
    print(error)
try:
    nosa_jax.generate(jax.device_put(model, jax.devices()[1]), tokens, mesh=mesh)
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_rows_on_four_devices_are_what_they_are_on_one():
    """Ragged rows that stop at different steps, sampled; with a host store per device, and without one."""
    done = subprocess.run(
        [sys.executable, "-c", _GENERATE], capture_output=True, text=True, timeout=600, cwd=Path(__file__).parent
    )
    rows, weights = done.stdout.splitlines() or (done.stderr[-3000:], "")
    assert rows.startswith("mesh: must have a number of devices that divides B = 6, got 4"), rows
    assert weights.startswith("model: must lie on all devices of the mesh"), weights
