"""A Llama in llama.cpp's GGUF form, as the Hugging Face form has it: configuration, tensors and tokenizer.

Reads with the package `gguf` and computes with NumPy; nothing here needs torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pallas_kernels.checks import bad_value

# Names of llama.cpp and of Hugging Face's Llama. Whatever else a file may hold (biases, say) is refused.
OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
OF_A_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL, USER_DEFINED = 3, 4  # types of tokens in a GGUF file: special ones, and others that no merge makes


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The fields of a GGUF file by name, and its tensors in float32, quantised ones dequantised, named as there.

    Needs the package `gguf`, which reads the formats of llama.cpp.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        tensor.name: np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        for tensor in reader.tensors
    }
    return fields, tensors


def llama_config(fields: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """The content of config.json. tied: the embedding makes the logits, too.

    Raises ValueError for another architecture, and for a pre-tokenizer other than SmolLM's.
    """
    for name, expected in (("general.architecture", "llama"), ("tokenizer.ggml.pre", "smollm")):
        if fields.get(name) != expected:
            raise bad_value(name, f"must be {expected!r}", repr(fields.get(name)), "Take the file of SmolLM2.")
    heads = int(fields["llama.attention.head_count"])
    hidden = int(fields["llama.embedding_length"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": int(fields["llama.feed_forward_length"]),
        "num_hidden_layers": int(fields["llama.block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(fields.get("llama.attention.head_count_kv", heads)),
        "head_dim": int(fields.get("llama.rope.dimension_count", hidden // heads)),
        "max_position_embeddings": int(fields["llama.context_length"]),
        "rope_theta": _short(fields["llama.rope.freq_base"]),
        "rms_norm_eps": _short(fields["llama.attention.layer_norm_rms_epsilon"]),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "bos_token_id": int(fields["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(fields["tokenizer.ggml.eos_token_id"]),
    }


def llama_tensors(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors under Hugging Face's names, the rows of queries and keys in its order.

    Raises ValueError for a tensor that a Llama of Hugging Face does not have.
    """
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    found = {}
    for name, tensor in tensors.items():
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        if name in OUTER:
            found[OUTER[name]] = tensor
        elif layer and layer[2] in OF_A_LAYER:
            if layer[2] in heads:
                tensor = unpermuted(tensor, heads[layer[2]])
            found[f"model.layers.{layer[1]}.{OF_A_LAYER[layer[2]]}.weight"] = np.ascontiguousarray(tensor)
        else:
            raise bad_value("tensors", "must be those of a Llama without biases", repr(name), "Take another file.")
    return found


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys [heads * D, H] as Hugging Face has them.

    llama.cpp rotates the elements 2 i and 2 i + 1 of a head together, Hugging Face i and i + D / 2: files of the
    former hold the halves of each head interleaved.
    """
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def smollm_tokenizer(tokens: Sequence[str], types: Sequence[int], merges: Sequence[str]) -> Any:
    """The `tokenizers.Tokenizer` of SmolLM: byte-level BPE that takes every digit by itself.

    tokens, types: text and type of every id. merges: pairs as "left right", first come first merged.
    """
    import tokenizers
    from tokenizers import decoders, pre_tokenizers

    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]  # a space is never itself a letter here
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    # One call keeps their ids: all are in the vocabulary.
    tokenizer.add_tokens(
        [tokenizers.AddedToken(token, special=kind == CONTROL, normalized=False) for token, kind in added]
    )
    return tokenizer


def _short(value: float) -> float:
    """A number that the file holds in float32, as one would write it: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))
