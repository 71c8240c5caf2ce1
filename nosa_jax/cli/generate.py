"""`nosa generate`: text from a checkpoint, shown as it comes."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nosa_jax import CacheConfig, DecodeState, NosaLM, Sampling, decode, locality, prefill
from nosa_jax.cli.checkpoint import Dtype, load
from nosa_jax.cli.terminal import facts, size, working
from nosa_jax.config import Variant
from nosa_jax.decode import row_keys, sample
from nosa_jax.hf import GrowingText, load_tokenizer, stop_tokens
from pallas_kernels.checks import bad_value


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a prompt with a checkpoint, the text appearing as it is generated; figures go to stderr at the end."""

    path: Path
    """Folder with config.json and *.safetensors; tokenizer.json too, unless tokens are bytes (vocabulary 256)."""
    prompt: str | None = None
    """Text to continue; default: what comes in on stdin."""
    max_new_tokens: int = 256
    """Tokens to generate at most; an end-of-text token that the checkpoint names ends it earlier."""
    temperature: float = 0.0
    """Temperature of the sampling; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Sample among the k likeliest tokens."""
    top_p: float = 1.0
    """Sample among the fewest tokens whose probability reaches p."""
    seed: int = 0
    """Seed of the sampling."""
    offload: bool = True
    """Whether the KV cache lives in host memory, with a pool of blocks on the device."""
    slots: int | None = None
    """Size of the pool on the device, in blocks; default: 5/4 of the blocks that a query selects."""
    chunk: int | None = None
    """Tokens of the prompt read at once; default: all. Less needs less memory."""
    variant: Variant | None = None
    """How blocks are selected; default: what the checkpoint says."""
    dtype: Dtype = "auto"
    """Dtype of weights and cache; auto: float32 on a CPU, bfloat16 elsewhere."""

    def run(self) -> int:
        if self.max_new_tokens < 1:
            raise bad_value("--max-new-tokens", "must be >= 1", self.max_new_tokens, "Raise it.")
        sampling = Sampling(self.temperature, self.top_k, self.top_p)
        cache = CacheConfig(offload=self.offload, slots=self.slots)
        prompt = self._read_prompt()
        model = load(self.path, self.variant, self.dtype)
        tokenizer = load_tokenizer(self.path, model.config.vocab_size)
        tokens = tokenizer.encode(prompt)
        if not tokens:
            raise bad_value("--prompt", "must hold at least one token", repr(prompt), "Give some text to continue.")

        run = Continuation(model, tokens, self.max_new_tokens, cache, sampling, self.seed, self.chunk)
        stops = stop_tokens(self.path)
        text = GrowingText(tokenizer, tokens)
        run.read_prompt()
        print(prompt, end="", flush=True)
        for token in run:
            if token in stops:
                break
            print(text.add(token), end="", flush=True)
        print(text.finish(), flush=True)
        print_figures(run)
        return 0

    def _read_prompt(self) -> str:
        if self.prompt is not None:
            return self.prompt
        if sys.stdin.isatty():
            raise bad_value("--prompt", "must be given, or text on stdin", None, 'For example --prompt "def ".')
        return sys.stdin.read()


class Continuation:
    """The tokens that continue one prompt, one at a time; counts seconds and fetched blocks meanwhile.

    Call `read_prompt` first, then iterate, once.
    """

    def __init__(
        self,
        model: NosaLM,
        prompt: list[int],
        max_new_tokens: int,
        cache: CacheConfig,
        sampling: Sampling,
        seed: int,
        chunk: int | None,
    ) -> None:
        self.model, self.prompt, self.max_new_tokens = model, prompt, max_new_tokens
        self.cache, self.chunk = cache, chunk
        self.sampling, self.keys = sampling, row_keys(jax.random.key(seed), 1, sampling)
        self.prefill_seconds = 0.0
        self.step_seconds: list[float] = []
        self.fetched: list[int] = []

    def read_prompt(self) -> None:
        """Fills the cache with the prompt."""
        begin = time.perf_counter()
        with working(f"reading the prompt, {len(self.prompt)} tokens"):
            self.state, self.logits = prefill(
                self.model,
                np.asarray([self.prompt], np.int32),
                max_length=len(self.prompt) + self.max_new_tokens,
                cache=self.cache,
                chunk=self.chunk,
            )
            jax.block_until_ready(self.logits)
        self.prefill_seconds = time.perf_counter() - begin

    def __iter__(self) -> Iterator[int]:
        token = sample(self.logits, self.keys, self.state.lengths, self.sampling)
        yield int(token[0])
        for _ in range(1, self.max_new_tokens):
            begin = time.perf_counter()
            self.state, token, fetched = _step(self.model, self.state, token, self.keys, self.sampling)
            number = int(token[0])
            self.step_seconds.append(time.perf_counter() - begin)
            self.fetched.append(0 if fetched is None else int(np.asarray(fetched).sum()))
            yield number


@functools.partial(
    jax.jit, static_argnames="sampling", donate_argnames="state", compiler_options=decode.COMPILER_OPTIONS
)
def _step(model: NosaLM, state: DecodeState, token: Any, keys: Any, sampling: Sampling) -> tuple[DecodeState, Any, Any]:
    """One token more: the new state, the token that follows, and the blocks fetched per layer, row and KV head."""
    state, out = decode.run_step(model, state, token)
    return state, sample(out.logits, keys, state.lengths, sampling), out.fetched


def print_figures(run: Continuation) -> None:
    """Prints speed and transfers of a finished run to stderr."""
    config = run.model.config
    rows: list[tuple[str, object]] = [
        ("prompt", f"{len(run.prompt)} tokens in {run.prefill_seconds:.2f} s, compilation included")
    ]
    if len(run.step_seconds) > 1:  # the first step compiles
        rate = (len(run.step_seconds) - 1) / sum(run.step_seconds[1:])
        rows.append(("speed", f"{rate:,.1f} tokens/s over {len(run.step_seconds)} steps, after compilation"))
    blocks = run.state.num_blocks
    if run.state.host is None:
        rows.append(("cache", f"all {blocks} blocks on the device"))
    else:
        rows.append(("cache", f"in host memory, {run.state.pool.shape[3]} of {blocks} blocks on the device"))
        if run.fetched:
            mean = sum(run.fetched) / len(run.fetched)
            block = locality.block_bytes(config.attention, config.head_dim, run.model.embed.dtype.itemsize)
            rows.append(
                (
                    "fetched",
                    f"{mean / (config.num_layers * config.num_kv_heads):.2f} blocks per step, layer and KV head; "
                    f"{size(mean * block)} per token",
                )
            )
    print(file=sys.stderr)
    facts(rows, stderr=True)
