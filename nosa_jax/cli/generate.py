"""`nosa generate`: text from a checkpoint, shown as it comes."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

import nosa_jax
from nosa_jax import CacheConfig, NosaLM, Sampling, Step
from nosa_jax.cli.checkpoint import Dtype, encode, load, note_attended, note_context
from nosa_jax.cli.policy import PolicyName, cache_of, require_whole_prompts, variant_of
from nosa_jax.cli.terminal import facts, show, size, working
from nosa_jax.config import Variant
from nosa_jax.decode import room_for
from nosa_jax.hf import GrowingText
from nosa_jax.hf.text import tokenizer_of
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
    policy: PolicyName | None = None
    """Another system's way to decode with a dense model (variant full), in place of attention to everything."""
    policy_settings: tuple[str, ...] = ()
    """Settings of the policy, as budget=1536 local_chunks=16; default: those of the comparison in the NOSA paper."""
    chunk: int | None = None
    """Tokens of the prompt read at once; default: all. Less needs less memory."""
    variant: Variant | None = None
    """How blocks are selected; default: what the checkpoint says, full with a policy."""
    dtype: Dtype = "auto"
    """Dtype of weights and cache; auto: float32 on a CPU, bfloat16 elsewhere."""

    def run(self) -> int:
        if self.max_new_tokens < 1:
            raise bad_value("--max-new-tokens", "must be >= 1", self.max_new_tokens, "Raise it.")
        sampling = Sampling(self.temperature, self.top_k, self.top_p)
        cache = cache_of(self.offload, self.slots, self.policy, self.policy_settings)
        require_whole_prompts(self.policy, self.chunk)
        prompt = self._read_prompt()
        model = load(self.path, variant_of(self.variant, self.policy), self.dtype)
        # As the model says, not the folder, in which another model may lie by now.
        stops, tokenizer = model.stop_tokens, tokenizer_of(model.origin.files, model.config.vocab_size, self.path)
        tokens = encode(tokenizer, prompt, "the prompt")
        if not tokens:
            raise bad_value("--prompt", "must hold at least one token", repr(prompt), "Give some text to continue.")
        note_context(model, len(tokens) + self.max_new_tokens)
        if cache.policy is not None:
            note_attended(str(self.policy), cache.policy.num_attended, len(tokens))
        waits = timed(
            nosa_jax.stream(
                model,
                np.asarray([tokens], np.int32),
                max_new_tokens=self.max_new_tokens,
                cache=cache,
                sampling=sampling,
                key=jax.random.key(self.seed),
                record=("fetched",),
                chunk=self.chunk,
            )
        )
        with working(f"reading the prompt, {len(tokens)} tokens"):
            first = next(waits)
        show(prompt.decode("utf-8", errors="replace"), end="")
        text, seen = GrowingText(tokenizer, tokens), []
        for step, seconds in itertools.chain([first], waits):
            seen.append((step, seconds))
            if int(step.tokens[0]) in stops:
                break
            show(text.add(int(step.tokens[0])), end="")
        show(text.finish())
        show(stderr=True)
        facts(figures(model, len(tokens), room_for(len(tokens), self.max_new_tokens), cache, seen), stderr=True)
        return 0

    def _read_prompt(self) -> bytes:
        if self.prompt is not None:
            return self.prompt.encode("utf-8", errors="surrogateescape")  # the bytes that were typed
        if sys.stdin.isatty():
            raise bad_value("--prompt", "must be given, or text on stdin", None, 'For example --prompt "def ".')
        return sys.stdin.buffer.read()


def timed(steps: Iterator[Step]) -> Iterator[tuple[Step, float]]:
    """The steps, each with the seconds that it was waited for."""
    begin = time.perf_counter()
    for step in steps:
        yield step, time.perf_counter() - begin
        begin = time.perf_counter()


def figures(
    model: NosaLM, prompt: int, max_length: int, cache: CacheConfig, steps: list[tuple[Step, float]]
) -> Iterator[tuple[str, object]]:
    """Names and values of what a run of one row took. prompt: its tokens."""
    (_, prompt_seconds), *rest = steps
    yield "prompt", f"{prompt} tokens in {prompt_seconds:.2f} s, compilation included"
    if len(rest) > 1:  # the first step compiles
        rate = (len(rest) - 1) / sum(seconds for _, seconds in rest[1:])
        yield "speed", f"{rate:,.1f} tokens/s over {len(rest)} steps, after compilation"
    rooms = {"prompt": prompt, "new": max(1, max_length - prompt)}
    plan = nosa_jax.plan(model.config, 1, max_length, cache, dtype=model.embed.dtype, **rooms)
    blocks = "blocks" if cache.policy is None else "units"
    if plan.slots is None:
        yield "cache", f"all {plan.num_blocks} {blocks} on the device"
        return
    yield "cache", f"in host memory, {plan.slots} of {plan.num_blocks} {blocks} on the device"
    if rest:
        fetched = np.stack([step.fetched for step, _ in rest])  # [steps, L, 1, K]
        per_token = fetched.sum() / len(rest) * plan.block_bytes
        yield "fetched", f"{fetched.mean():.2f} {blocks} per step, layer and KV head; {size(per_token)} per token"
