"""Bounded memory, measured on a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PEAK_OF_ONE_LAYER = """
import resource, jax, jax.numpy as jnp
from flax import nnx
from nosa_jax import AttentionConfig, ModelConfig
from nosa_jax.attention.layer import Attention
from nosa_jax.attention.layout import row_layout

length = 16384
config = ModelConfig(vocab_size=16, hidden_size=512, intermediate_size=16, num_layers=1, num_heads=8, num_kv_heads=2,
                     head_dim=64, attention=AttentionConfig())
stack = Attention(config, rngs=nnx.Rngs(0), dtype=jnp.float32)
layer = jax.tree.map(lambda p: p[0], stack)
x = jax.random.normal(jax.random.key(0), (1, length, 512))
layout = row_layout(jnp.zeros((1, length), jnp.int32), None)

@jax.jit
def loss(layer, x):
    out, _ = layer(config, x, layout)
    return (out ** 2).mean()

value, grads = jax.value_and_grad(loss, argnums=(0, 1))(layer, x)
jax.block_until_ready(grads)
assert jnp.isfinite(value) and all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_one_layer_forward_and_backward_at_16384_tokens_stays_under_3_gib():
    done = subprocess.run([sys.executable, "-c", _PEAK_OF_ONE_LAYER], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout)
    assert peak < 3 * 2**30, f"peaked at {peak / 2**30:.2f} GiB resident"
