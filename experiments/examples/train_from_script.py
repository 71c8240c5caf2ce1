"""Train a model from a script of your own: your optimizer, your loss, your data.

    python -m experiments.examples.train_from_script --steps 60 --out runs/own

The model is a plain pytree and `forward` a pure function, so that a training loop is ordinary JAX and optax.
`nosa_jax.train` is the ready-made one, with logs, evaluation, checkpoints and resume.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import nosa_jax


def batches(text: np.ndarray, batch: int, length: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Your data: any int32 [B, T + 1]. Here windows of the text from anywhere, one token per byte."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(text) - length, batch)
        yield text[starts[:, None] + np.arange(length + 1)].astype(np.int32)


def loss(model: nosa_jax.NosaLM, tokens: jax.Array) -> jax.Array:
    """Your loss: here cross entropy in nats, and a small price on the normaliser of the logits ("z-loss")."""
    logits = nosa_jax.forward(model, tokens[:, :-1]).logits  # float32 [B, T, V]
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return entropy.mean() + 1e-4 * jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)


def main(arguments: list[str] | None = None) -> list[float]:
    """Trains, saves, and returns the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=inspect.getsourcefile(argparse), help="the file to learn")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=4, help="windows per step")
    parser.add_argument("--length", type=int, default=256, help="tokens per window")
    parser.add_argument("--out", type=Path, help="folder for the trained model, in Hugging Face's form")
    args = parser.parse_args(arguments)

    model = nosa_jax.NosaLM(nosa_jax.presets.tiny(), rngs=nnx.Rngs(0))
    # Your optimizer: anything of optax. Its state is a pytree beside the model.
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, args.steps // 10, args.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.lion(schedule, weight_decay=0.1))
    state = optimizer.init(model)

    @jax.jit
    def step(model, state, tokens):
        value, grads = jax.value_and_grad(loss)(model, tokens)
        updates, state = optimizer.update(grads, state, model)
        return optax.apply_updates(model, updates), state, value

    losses = []
    text = np.fromfile(args.text, np.uint8)
    for number, tokens in zip(range(args.steps), batches(text, args.batch, args.length), strict=False):
        model, state, value = step(model, state, tokens)
        losses.append(float(value))  # waits for the device; look less often when steps are short
        if number % 10 == 0 or number == args.steps - 1:
            print(f"step {number}: loss {losses[-1]:.3f} nats", flush=True)
    if args.out:
        nosa_jax.save_pretrained(model, args.out)  # from_pretrained, or `nosa generate`, reads it
        print(f"wrote {args.out}")
    return losses


if __name__ == "__main__":
    main()
