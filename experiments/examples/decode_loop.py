"""A decode loop of your own, its KV cache in host memory, checked against `generate`.

    python -m experiments.examples.decode_loop --new 32 --slots 10

Two prompts of different lengths are continued greedily; then a second turn is read into the same cache.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from flax import nnx

import nosa_jax
from nosa_jax import CacheConfig


def main(arguments: list[str] | None = None) -> np.ndarray:
    """Returns the tokens of the first turn, int32 [B, new]."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a checkpoint; default: a tiny model of random weights")
    parser.add_argument("--new", type=int, default=32, help="tokens to generate per row")
    parser.add_argument("--slots", type=int, help="blocks per row, layer and KV head that stay on the device")
    args = parser.parse_args(arguments)

    if args.model:
        model = nosa_jax.from_pretrained(args.model)
    else:
        model = nosa_jax.NosaLM(nosa_jax.presets.tiny(), rngs=nnx.Rngs(0))
    # Prompts are right-padded; each row has a length of its own.
    prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 300)).astype(np.int32)
    lengths, turn = np.array([300, 211]), prompts[:, :40]
    cache = CacheConfig(slots=args.slots)

    # The state is one pytree: the pool of blocks on the device, the store in host memory, which block lies where.
    room = prompts.shape[1] + args.new + turn.shape[1]
    state, logits = nosa_jax.prefill(model, prompts, lengths, max_length=room, cache=cache)
    tokens = [logits.argmax(-1)]
    while len(tokens) < args.new:
        # The old state is donated, that is, gone: go on with the new one.
        state, logits = nosa_jax.jit_decode_step(model, state, tokens[-1])
        tokens.append(logits.argmax(-1))  # your sampling, your stop rule
    ours = np.stack(tokens, axis=1).astype(np.int32)
    print("tokens in the cache:", state.lengths.tolist(), "of at most", state.max_length)

    # `generate` is the same loop in one jitted call; it also records what crossed from the host.
    theirs = nosa_jax.generate(model, prompts, lengths, max_new_tokens=args.new, cache=cache, record=("fetched",))
    assert (ours == theirs.tokens).all(), "generate must give the same tokens"
    print(f"blocks fetched per step, layer and KV head: {float(theirs.fetched[..., 1:].mean()):.2f}")

    # The next turn: the last token was drawn but never fed, so it comes first.
    state, logits = nosa_jax.extend(model, state, np.concatenate([ours[:, -1:], turn], axis=1))
    # As if the whole text had been read at once, up to rounding.
    whole = np.zeros((2, room), np.int32)
    for row, length in enumerate(lengths):
        text = np.concatenate([prompts[row, :length], ours[row], turn[row]])
        whole[row, : len(text)] = text
    again = nosa_jax.forward(model, whole, state.lengths, logits="last").logits[:, 0]
    print(f"logits after the second turn, against reading all again: {float(abs(logits - again).max()):.1e} apart")
    return ours


if __name__ == "__main__":
    main()
