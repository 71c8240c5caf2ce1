"""The language model: a Llama-style decoder whose layers are stacked and scanned, and its plain forward pass."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from nosa_jax import parallel
from nosa_jax._pytree import pytree_dataclass
from nosa_jax.attention import layout
from nosa_jax.attention.layer import SELECTION, Attention, Recorded
from nosa_jax.config import ModelConfig
from nosa_jax.origin import Origin
from pallas_kernels import rms_norm as rms_norm_of_layer
from pallas_kernels.checks import (
    IntegersLike,
    as_float_dtype,
    as_integers,
    bad_value,
    is_concrete,
    is_tracing,
    require_bool,
    require_one_of,
    require_shape,
    require_type,
)
from pallas_kernels.derivatives import reverse_mode_only
from pallas_kernels.device import current_device
from pallas_kernels.formulas import rms_norm
from pallas_kernels.promotion import usual_promotion

Logits = Literal["all", "last", "none"]
Remat = bool | Literal["offload"]


@pytree_dataclass
class ForwardOutput:
    """logits [B, T, V] float32 ([B, 1, V] for "last", None for "none"); hidden [B, T, H] after the final norm;
    block_ids [L, B, K, T, J] int32 when recorded, else None (always None for `full`)."""

    logits: Any
    hidden: Any
    block_ids: Any = None


class MLP(nnx.Module):
    """SwiGLU of all layers, stacked. gate_up [L, H, 2, F]: gate, then up. down [L, F, H]."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        layers, hidden, inner = config.num_layers, config.hidden_size, config.intermediate_size
        scale = 0.02 / (2 * layers) ** 0.5
        self.gate_up = nnx.Param(0.02 * jax.random.normal(rngs.params(), (layers, hidden, 2, inner), dtype))
        self.down = nnx.Param(scale * jax.random.normal(rngs.params(), (layers, inner, hidden), dtype))

    def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        both = jnp.einsum("bth,hcf->btcf", x, self.gate_up[...])
        return (jax.nn.silu(both[..., 0, :]) * both[..., 1, :]) @ self.down[...]


class Layers(nnx.Module):
    """All decoder layers, stacked; `lax.scan` over this module yields one layer at a time."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        shape = (config.num_layers, config.hidden_size)
        self.attention_norm = nnx.Param(jnp.ones(shape, dtype))
        self.attention = Attention(config, rngs=rngs, dtype=dtype)
        self.mlp_norm = nnx.Param(jnp.ones(shape, dtype))
        self.mlp = MLP(config, rngs=rngs, dtype=dtype)

    def block[R](
        self,
        config: ModelConfig,
        x: Float[Array, "B T H"],
        attend: Callable[[Attention, Float[Array, "B T H"]], tuple[Float[Array, "B T H"], R]],
        index: Int32[Array, ""] | None = None,
        mlp_tokens: int | None = None,
    ) -> tuple[Float[Array, "B T H"], R]:
        """The way through one layer: norm, attend, residual, norm, MLP, residual.

        attend: from one layer's attention and its input to its output and anything else, which is returned too.
        index: which layer; None where this module is one layer's slice already, as a scan hands it out.
        mlp_tokens: how many go through the MLP at once; None for all.
        """
        half = lambda parts, x: (parts, x) if index is None else _layer_at(parts, index, x)
        normed = functools.partial(_normed, config, index=index)
        attention, x = half(self.attention, x)
        out, rest = attend(attention, normed(x, self.attention_norm[...]))
        mlp, x = half(self.mlp, parallel.activations(x + out))
        add_mlp = lambda x: x + mlp(normed(x, self.mlp_norm[...]))
        return parallel.activations(add_mlp(x) if mlp_tokens is None else _in_pieces(add_mlp, x, mlp_tokens)), rest


def _normed(
    config: ModelConfig, x: Float[Array, "B T H"], weight: Float[Array, "*L H"], *, index: Int32[Array, ""] | None
) -> Float[Array, "B T H"]:
    """x after the RMS norm of one layer. weight: its own, or with an index those of all layers."""
    if index is None:
        return rms_norm(x, weight, config.rms_norm_eps)
    flat = rms_norm_of_layer(x.reshape(-1, x.shape[-1]), weight, index, eps=config.rms_norm_eps)
    return flat.reshape(x.shape)


def _in_pieces(function: Callable[[Array], Array], x: Float[Array, "B T H"], tokens: int) -> Float[Array, "B T H"]:
    """`function` of so many tokens at a time, whatever their rows, each piece written over what it was made of."""
    flat = x.reshape(1, -1, x.shape[-1])
    whole, rest = divmod(flat.shape[1], tokens)
    if whole + (rest > 0) == 1:
        return function(x)

    def body(piece: Array, flat: Array) -> Array:
        start = piece.astype(jnp.int32) * tokens
        part = jax.lax.dynamic_slice_in_dim(flat, start, tokens, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(flat, function(part), start, axis=1)

    flat = jax.lax.fori_loop(0, whole, body, flat)
    if rest:
        last = jax.lax.slice_in_dim(flat, whole * tokens, None, axis=1)
        flat = jax.lax.dynamic_update_slice_in_dim(flat, function(last), whole * tokens, axis=1)
    return flat.reshape(x.shape)


def _layer_at[Parts](parts: Parts, index: Int32[Array, ""], x: Array) -> tuple[Parts, Array]:
    """One layer of stacked parameters, at the index of a loop.

    On a GPU the matrix products read the stack itself, where they see the loop's own index. Elsewhere the layer is
    sliced only once `x` is computed: a step then keeps one slice at a time.
    """
    if not current_device().is_gpu:
        index, x = jax.lax.optimization_barrier((index, x))
    return jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, index, keepdims=False), parts), x


class NosaLM(nnx.Module):
    """A decoder with NOSA attention or one of its rivals (`config.attention.variant`).

    The module is a pytree: pass it to functions under `jax.jit`, `jax.grad` and `lax.scan` as it is. Matrices are
    stored [in, out]. `dtype` is that of parameters and computation; importance, scores, norms and logits are float32
    in any.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        require_type("config", config, ModelConfig, "Pass presets.tiny() or a ModelConfig of your own.")
        require_type("rngs", rngs, nnx.Rngs, "Pass nnx.Rngs(0).")
        dtype = as_float_dtype("dtype", dtype)
        self.config = config
        self.origin = Origin()
        vocab = (config.vocab_size, config.hidden_size)
        self.embed = nnx.Param(0.02 * jax.random.normal(rngs.params(), vocab, dtype))
        self.layers = Layers(config, rngs=rngs, dtype=dtype)
        self.norm = nnx.Param(jnp.ones((config.hidden_size,), dtype))
        self.lm_head = (
            None if config.tie_embeddings else nnx.Param(0.02 * jax.random.normal(rngs.params(), vocab[::-1], dtype))
        )

    def __call__(self, tokens: IntegersLike, lengths: IntegersLike | None = None, **options: Any) -> ForwardOutput:
        return forward(self, tokens, lengths, **options)

    def embedded(self, tokens: Int32[Array, "B T"]) -> Float[Array, "B T H"]:
        """The embedding of each token."""
        table = parallel.gather(self.embed[...], "embed", stacked=False)
        look_up = lambda table, tokens: table[tokens]
        return parallel.activations(parallel.per_row_and_head(look_up, (table, tokens), ("..", "bt"), "bt."))

    def head(self) -> Float[Array, "rows columns"]:
        """The matrix that makes logits, whole along `fsdp`: [H, V], or the embedding [V, H] where that is tied."""
        if self.lm_head is None:
            return parallel.gather(self.embed[...], "embed", stacked=False)
        return parallel.gather(self.lm_head[...], "lm_head", stacked=False)

    def logits_by(self, head: Float[Array, "rows columns"], hidden: Float[Array, "*rest H"]) -> Float[Array, "*rest V"]:
        """float32 logits of hidden states after the final norm, by the matrix of `head`."""
        formula = "...h,vh->...v" if self.lm_head is None else "...h,hv->...v"
        return jnp.einsum(formula, hidden, head, preferred_element_type=jnp.float32)

    def logits(self, hidden: Float[Array, "*rest H"]) -> Float[Array, "*rest V"]:
        """float32 logits of hidden states after the final norm."""
        if math.prod(hidden.shape[:-1]) != 1 or not current_device().is_gpu:
            return self.logits_by(self.head(), hidden)
        # XLA would multiply one row by a float32 copy of the whole matrix, made anew every time. Two rows it does not.
        return self.logits_by(self.head(), jnp.stack([hidden, hidden]))[0]

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The end-of-text ids that came with the checkpoint, for `generate(stop_tokens=...)`; empty without any."""
        return self.origin.stop_tokens

    def final_norm(self, x: Float[Array, "*rest H"]) -> Float[Array, "*rest H"]:
        return rms_norm(x, self.norm[...], self.config.rms_norm_eps)


@usual_promotion
def forward(
    model: NosaLM,
    tokens: IntegersLike,
    lengths: IntegersLike | None = None,
    *,
    segment_ids: IntegersLike | None = None,
    block_ids: IntegersLike | None = None,
    logits: Logits = "all",
    record: bool = False,
    remat: Remat = False,
) -> ForwardOutput:
    """Runs whole rows without a cache: training and evaluation. Same as `model(tokens, ...)`.

    tokens: int [B, T], right-padded where `lengths` [B] says so; padded positions give finite logits and ids of -1.
    segment_ids: int [B, T] for rows that pack several documents: each run of one id is a document of its own, starts
        on a block boundary and is computed as if it were alone. Ids need not ascend. -1 marks padding, and so does a
        run of 0 that starts inside a block after a document counted from 1. Padding ends its document: the same id
        after it is a new document. With `lengths` too, tokens from there on are padding. Under jit, where values
        cannot be checked, a run that starts inside a block is padding.
    block_ids: int [L, B, K, T, J] from an earlier call with `record`, used instead of selecting.
    logits: "all", "last" (of each row's last token) or "none".
    record: whether the block ids come back.
    remat: recompute each layer, but not its selection, in the backward pass instead of keeping its activations.
        "offload" does so, too, and keeps what enters each layer in host memory meanwhile.
    Differentiable once, in reverse mode, as `block_attention` is. `jax_enable_x64`, `jax_numpy_rank_promotion` and
    `jax_numpy_dtype_promotion` are supported here, in decoding and in training steps: bits stay as they are, but for
    the optimizer's own numbers, which have 64 bits where they may.
    Raises ValueError or TypeError for wrong shapes and dtypes, and for wrong values outside `jax.jit`.
    """
    require_type("model", model, NosaLM, "Build one with NosaLM(...) or from_pretrained(...).")
    config = model.config
    require_one_of("logits", logits, get_args(Logits))
    record, remat = require_bool("record", record), as_remat("remat", remat)
    tokens = layout.as_tokens(tokens, config.vocab_size)
    lengths = layout.as_lengths(lengths, tokens.shape[0], tokens.shape[1])
    if segment_ids is not None:
        segment_ids = layout.as_segment_ids(segment_ids, tokens.shape, config.attention.block_size, lengths)
    if block_ids is not None:
        block_ids = as_block_ids(config, block_ids, _rows(config, tokens, lengths, segment_ids).positions)
    run = _forward if is_tracing() else _compiled_forward
    return run(model, tokens, lengths, segment_ids, block_ids, logits=logits, record=record, remat=remat)


def _rows(config: ModelConfig, tokens: Array, lengths: Array | None, segment_ids: Array | None) -> layout.Layout:
    if segment_ids is None:
        return layout.row_layout(tokens, lengths)
    return layout.packed_layout(segment_ids, lengths, config.attention.block_size)


def _forward(
    model: NosaLM,
    tokens: Int32[Array, "B T"],
    lengths: Int32[Array, " B"] | None,
    segment_ids: Int32[Array, "B T"] | None,
    forced_block_ids: Int32[Array, "L B K T J"] | None,
    *,
    logits: Logits,
    record: bool,
    remat: Remat,
) -> ForwardOutput:
    """`forward` of checked input."""
    mesh = parallel.mesh_of(model, tokens)
    recorded = record and model.config.attention.is_sparse

    def body(model: NosaLM, tokens: Array, *rest: Any) -> ForwardOutput:
        record = (lambda layer: parallel.in_row_order(layer.block_ids, axis=2)) if recorded else None
        hidden, ids = hidden_states(model, tokens, *rest, record=record, remat=remat)
        hidden = parallel.in_row_order(hidden, axis=1)
        if logits == "none":
            return ForwardOutput(None, hidden, ids)
        if logits == "last":
            last = jnp.max(_rows(model.config, tokens, *rest[:2]).positions, axis=1)[:, None, None]
            return ForwardOutput(model.logits(jnp.take_along_axis(hidden, last, axis=1)), hidden, ids)
        return ForwardOutput(model.logits(hidden), hidden, ids)

    axes = parallel.rows_of(tokens)
    rows, of_layers = PartitionSpec(axes), PartitionSpec(None, axes)
    out = ForwardOutput(None if logits == "none" else rows, rows, of_layers if recorded else None)
    return parallel.run(mesh, body, model, tokens, lengths, segment_ids, forced_block_ids, out=out)


def hidden_states(
    model: NosaLM,
    tokens: Int32[Array, "B T"],
    lengths: Int32[Array, " B"] | None,
    segment_ids: Int32[Array, "B T"] | None,
    forced_block_ids: Int32[Array, "L B K T J"] | None = None,
    *,
    record: Callable[[Recorded], Any] | None = None,
    remat: Remat = False,
) -> tuple[Float[Array, "B T H"], Any]:
    """Hidden states after the final norm, and what `record` kept, with tokens in the order of `parallel.query_order`.

    For checked input inside `parallel.run`; `forward` says what the other arguments are.
    record: from what a layer recorded to a pytree of arrays, which come back stacked by layer. Nothing else of it is
        held. None keeps nothing, and so does `full`.
    """
    config = model.config
    rows = _rows(config, tokens, lengths, segment_ids)
    rows = dataclasses.replace(
        rows,
        positions=parallel.in_query_order(rows.positions, axis=1),
        rope_positions=parallel.in_query_order(rows.rope_positions, axis=1),
    )
    tokens = parallel.in_query_order(tokens, axis=1)
    if forced_block_ids is not None:
        forced_block_ids = parallel.in_query_order(forced_block_ids, axis=3)

    def run_layer(x: Array, inputs: tuple[Layers, Array | None]) -> tuple[Array, Any]:
        layer, forced = inputs
        x = checkpoint_name(x, _LAYER_INPUT)
        layer = parallel.gather(layer, "layers")
        x, recorded = layer.block(config, x, lambda attention, x: attention(config, x, rows, forced))
        return x, None if record is None or recorded is None else record(recorded)

    policy = _policy(remat)
    body = run_layer if policy is None else jax.checkpoint(run_layer, policy=policy)
    with reverse_mode_only("forward"):
        x, recorded = jax.lax.scan(body, model.embedded(tokens), (model.layers, forced_block_ids))
    return model.final_norm(x), recorded


_LAYER_INPUT = "layer_input"


def _policy(remat: Remat) -> Callable[..., Any] | None:
    """What the backward pass of a layer finds, as `jax.checkpoint` takes it; None for everything.

    The selection is kept always: it is small, takes no gradient, and making it again would mean all scores again.
    """
    policies = jax.checkpoint_policies
    if remat == "offload":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[SELECTION],
            names_which_can_be_offloaded=[_LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    if remat:
        return policies.save_only_these_names(SELECTION)
    return parallel.keep_all_but_gathered if parallel.gathers() else None


def as_remat(name: str, remat: Any) -> Remat:
    """`remat` where it says what `forward` knows; raises TypeError or ValueError elsewhere."""
    if isinstance(remat, str):
        require_one_of(name, remat, ("offload",))
        return "offload"
    return require_bool(name, remat)


# What runs where the caller is not compiled: the next call of the same shapes finds the program of the first.
_compiled_forward = jax.jit(_forward, static_argnames=("logits", "record", "remat"))


def as_block_ids(
    config: ModelConfig, block_ids: Any, positions: Int32[Array, "B T"], name: str = "block_ids"
) -> Array | None:
    """Checked int32 [L, B, K, T, J] for a replay, or None as given."""
    if block_ids is None:
        return None
    if not config.attention.is_sparse:
        raise bad_value(name, "has no meaning for variant 'full'", "an array", "Drop it.")
    block_ids = as_integers(name, block_ids)
    batch, length = positions.shape
    expected = (config.num_layers, batch, config.num_kv_heads, length, config.attention.num_selected_blocks)
    require_shape(name, block_ids, expected, "[L, B, K, T, J]")
    if is_concrete(block_ids, positions):
        own = jnp.where(positions >= 0, positions // config.attention.block_size, -1)[None, :, None, :, None]
        before, after = block_ids[..., :-1], block_ids[..., 1:]
        ascending = jnp.all(jnp.where(before >= 0, (after > before) | (after == -1), after == -1))
        if not bool(ascending & jnp.all((block_ids >= -1) & (block_ids <= own))):
            raise bad_value(
                name,
                "must ascend without repeats, padded with -1 at the end, none after the query's own block",
                "ids that break this",
                "Use ids recorded on rows of the same lengths.",
            )
    return block_ids
