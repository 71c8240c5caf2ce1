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
    part: index into what is left of the parameter, whose axes are [in, ..., out, ...]; empty for the whole of it.
    inputs: how many of its axes are inputs, which the checkpoint has last; 0 for vectors and the embedding.
    """

    name: str
    shape: tuple[int, ...]
    target: str
    layer: int | None = None
    part: tuple[Any, ...] = ()
    inputs: int = 0

    def view(self, parameter: Any) -> Any:
        """The part of `parameter` (numpy or jax, whole) that is this tensor, its axes in the checkpoint's order.

        [out, ..., in, ...], where the checkpoint's matrix has the outputs and the inputs as one axis each.
        """
        part = parameter if self.layer is None else parameter[self.layer]
        part = part[self.part]
        return part.transpose(*range(self.inputs, part.ndim), *range(self.inputs))

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
        pieces.append(Piece("lm_head.weight", (vocab, hidden), "lm_head", inputs=1))
    return pieces


def _layer_pieces(config: ModelConfig, layer: int, importance: bool) -> Iterator[Piece]:
    hidden, ffn = config.hidden_size, config.intermediate_size
    heads, kv_heads, group = config.num_heads, config.num_kv_heads, config.group_size
    q_width, kv_width = heads * config.head_dim, kv_heads * config.head_dim
    prefix = f"model.layers.{layer}."

    def piece(name: str, shape: tuple[int, ...], target: str, **rest: Any) -> Piece:
        return Piece(prefix + name, shape, f"layers.{target}", layer, **rest)

    def of_heads(letter: str, width: int, members: slice | int) -> Piece:
        """members: which of the group of a KV head."""
        every = slice(None)
        part = (every, every, members)
        return piece(f"self_attn.{letter}_proj.weight", (width, hidden), "attention.qkv", part=part, inputs=1)

    def bias_of_heads(letter: str, width: int, members: slice | int) -> Piece:
        return piece(f"self_attn.{letter}_proj.bias", (width,), "attention.qkv_bias", part=(slice(None), members))

    def of_mlp(name: str, half: int) -> Piece:
        return piece(f"mlp.{name}_proj.weight", (ffn, hidden), "mlp.gate_up", part=(slice(None), half), inputs=1)

    for letter, width, members in (("q", q_width, slice(group)), ("k", kv_width, group), ("v", kv_width, group + 1)):
        yield of_heads(letter, width, members)
        if config.qkv_bias:
            yield bias_of_heads(letter, width, members)
    yield piece("self_attn.o_proj.weight", (hidden, q_width), "attention.output", inputs=1)
    if config.output_bias:
        yield piece("self_attn.o_proj.bias", (hidden,), "attention.output_bias")
    if config.qk_norm:
        yield piece("self_attn.q_norm.weight", (config.head_dim,), "attention.query_norm")
        yield piece("self_attn.k_norm.weight", (config.head_dim,), "attention.key_norm")
    if importance:
        yield piece("self_attn.A", (kv_heads,), "attention.importance.A")
        yield piece("self_attn.delta.weight", (kv_heads, kv_width), "attention.importance.delta", inputs=2)
    yield of_mlp("gate", 0)
    yield of_mlp("up", 1)
    yield piece("mlp.down_proj.weight", (hidden, ffn), "mlp.down", inputs=1)
    yield piece("input_layernorm.weight", (hidden,), "attention_norm")
    yield piece("post_attention_layernorm.weight", (hidden,), "mlp_norm")
