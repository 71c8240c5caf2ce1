"""Which checkpoint tensor fills which part of which parameter, both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from nosa_jax.config import ModelConfig

IMPORTANCE = "layers.attention.importance."


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor of a checkpoint and its place in our parameters.

    name, shape: as the checkpoint has them (linear weights are [out, in]).
    target: our parameter, as a dotted path from the model.
    layer: index on the leading axis of a stacked parameter, None where there is no such axis.
    columns: range on the last axis of a fused parameter, None where the tensor is the whole of it.
    transpose: whether our orientation is the other one.
    """

    name: str
    shape: tuple[int, ...]
    target: str
    layer: int | None = None
    columns: tuple[int, int] | None = None
    transpose: bool = False

    def view(self, parameter: Any) -> Any:
        """The part of `parameter` (numpy or jax, whole) that is this tensor, with the shape the checkpoint gives it."""
        part = parameter if self.layer is None else parameter[self.layer]
        if self.columns is not None:
            part = part[..., slice(*self.columns)]
        return part.T if self.transpose else part

    @property
    def is_importance(self) -> bool:
        return self.target.startswith(IMPORTANCE)


def model_pieces(config: ModelConfig, *, importance: bool | None = None) -> list[Piece]:
    """Every tensor of a checkpoint of `config`, in the order in which they are written.

    importance: whether A and delta are among them; None asks the variant of `config`.
    """
    importance = config.attention.uses_importance if importance is None else importance
    vocab, hidden = config.vocab_size, config.hidden_size
    pieces = [Piece("model.embed_tokens.weight", (vocab, hidden), "embed")]
    for layer in range(config.num_layers):
        pieces += _layer_pieces(config, layer, importance)
    pieces.append(Piece("model.norm.weight", (hidden,), "norm"))
    if not config.tie_embeddings:
        pieces.append(Piece("lm_head.weight", (vocab, hidden), "lm_head", transpose=True))
    return pieces


def _layer_pieces(config: ModelConfig, layer: int, importance: bool) -> Iterator[Piece]:
    hidden, ffn = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_heads, config.num_kv_heads
    q_width, kv_width = heads * config.head_dim, kv_heads * config.head_dim
    prefix = f"model.layers.{layer}."

    def piece(name: str, shape: tuple[int, ...], target: str, **rest: Any) -> Piece:
        return Piece(prefix + name, shape, f"layers.{target}", layer, **rest)

    def fused(name: str, target: str, start: int, width: int) -> Piece:
        return piece(name, (width, hidden), target, columns=(start, start + width), transpose=True)

    yield fused("self_attn.q_proj.weight", "attention.qkv", 0, q_width)
    yield fused("self_attn.k_proj.weight", "attention.qkv", q_width, kv_width)
    yield fused("self_attn.v_proj.weight", "attention.qkv", q_width + kv_width, kv_width)
    yield piece("self_attn.o_proj.weight", (hidden, q_width), "attention.output", transpose=True)
    if importance:
        yield piece("self_attn.A", (kv_heads,), "attention.importance.A")
        yield piece("self_attn.delta.weight", (kv_heads, kv_width), "attention.importance.delta", transpose=True)
    yield fused("mlp.gate_proj.weight", "mlp.gate_up", 0, ffn)
    yield fused("mlp.up_proj.weight", "mlp.gate_up", ffn, ffn)
    yield piece("mlp.down_proj.weight", (hidden, ffn), "mlp.down", transpose=True)
    yield piece("input_layernorm.weight", (hidden,), "attention_norm")
    yield piece("post_attention_layernorm.weight", (hidden,), "mlp_norm")
