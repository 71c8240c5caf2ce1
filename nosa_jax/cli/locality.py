"""`nosa locality`: how much of a selection carries over from token to token, method beside method."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from nosa_jax import CacheConfig, NosaLM, Plan, Selections, train
from nosa_jax._extras import require_extras
from nosa_jax._paths import only_run, replacing
from nosa_jax.cli.checkpoint import Dtype, encode, load, note_attended, note_context
from nosa_jax.cli.terminal import facts, heading, indented, note_replaced, working
from nosa_jax.cli.train import read_corpus
from nosa_jax.config import ModelConfig, Variant
from nosa_jax.hf.text import tokenizer_of
from nosa_jax.locality import (
    LocalityReport,
    comparison_table,
    cost_table,
    draw,
    plot_importance,
    plot_top_tokens,
    pool_costs,
    record,
)
from pallas_kernels.checks import bad_value

_FILE = "locality.json"


@dataclasses.dataclass(frozen=True)
class Locality:
    """Record which blocks are selected while a text is decoded, and compare how local the methods are.

    The text is fed token by token (teacher forcing), so that every method reads the same words. With --free-running
    each method continues the prompt with the tokens it finds likeliest.
    """

    path: Path
    """Folder with config.json and *.safetensors; tokenizer.json too, unless tokens are bytes (vocabulary 256)."""
    text: Path | None = None
    """File to read; default: held-out source text of Python's standard library."""
    prompt_length: int = 512
    """Tokens that are read before the recording starts."""
    new_tokens: int = 512
    """Tokens that are decoded and recorded."""
    free_running: bool = False
    """Continue with generated tokens instead of those of the text."""
    variants: tuple[Variant, ...] = ("nosa", "infllmv2")
    """Methods to compare, all with the same weights."""
    slots: tuple[int, ...] | None = None
    """Sizes of the device pool, in blocks, to count transfers for; default: J, 5/4 J, 3/2 J and 2 J."""
    chunk: int | None = None
    """Tokens of the prompt read at once; default: all. Less needs less memory."""
    dtype: Dtype = "auto"
    """Dtype of weights and cache; auto: float32 on a CPU, bfloat16 elsewhere."""
    batch: int = 16
    """Rows that would decode together, for the times that are predicted from the misses."""
    heatmaps: bool = False
    """Draw the selections of all KV heads layer by layer, too, and where each method differs from the first."""
    importance: bool = False
    """Draw the importance of the tokens, too, and which of them matter most; nosa and dma have one."""
    save_selections: bool = False
    """Keep the selections as selections-NAME.npz, for `nosa_jax.Selections.load` and to replay them elsewhere."""
    out: Path = Path("locality-output")
    """Folder for figures and JSON."""

    def run(self) -> int:
        require_extras("hf", "plots")
        self._check()
        with contextlib.ExitStack() as stack:
            return self._run(stack)

    def _run(self, stack: contextlib.ExitStack) -> int:
        selections: dict[str, Selections] = {}
        models: dict[str, tuple[ModelConfig, Any]] = {}  # configuration and dtype
        tokens, tokenizer = np.empty(0, np.int32), None
        for variant in dict.fromkeys(self.variants):
            model = load(self.path, variant, self.dtype)
            for size in self.slots or ():
                CacheConfig(slots=size).resolve_slots(model.config.attention, size)  # says so early if one is too small
            if not tokens.size:
                tokens = self._read_tokens(model)
                tokenizer = tokenizer_of(model.origin.files, model.config.vocab_size, self.path)
                stack.enter_context(only_run("--out", self.out))  # no folder is made for what cannot be read
                length, attention = self.prompt_length + self.new_tokens, model.config.attention
                note_context(model, length)
                note_attended(variant, attention.num_selected_blocks * attention.block_size, length)
            with working(f"decoding {self.new_tokens} tokens with {variant}"):
                forced = None if self.free_running else tokens[self.prompt_length :]
                selections[variant] = record(
                    model,
                    tokens[: self.prompt_length],
                    self.new_tokens,
                    forced,
                    chunk=self.chunk,
                    importance=self.importance and model.config.attention.uses_importance,
                )
            models[variant] = model.config, model.embed.dtype
            del model
        with working("measuring"):
            reports = {name: chosen.report(self.slots) for name, chosen in selections.items()}
        length = self.prompt_length + self.new_tokens
        costs = {
            name: pool_costs(reports[name], config, batch=self.batch, max_length=length, dtype=dtype)
            for name, (config, dtype) in models.items()
        }
        heading(
            f"{self.prompt_length} tokens read, then {self.new_tokens} "
            + ("generated" if self.free_running else "of the text, fed one by one")
        )
        indented(comparison_table(reports))
        heading(f"What its bytes would take, {self.batch} rows of {length} tokens: a bound, not a promise")
        indented(cost_table(costs))
        note_replaced(self.out / _FILE)
        with working("writing"):
            written = draw(selections, reports, self.out, heatmaps=self.heatmaps)
            written += self._draw_importance(selections, tokens, tokenizer)
            if self.save_selections:
                written += self._save(selections)
            content = {"settings": self._settings(), "reports": as_json(reports), "costs": _plain(costs)}
            written.append(write_json(self.out / _FILE, content))
        heading("Written")
        facts((path.name, path) for path in written)
        return 0

    def _settings(self) -> dict[str, Any]:
        settings = dataclasses.asdict(self) | {"path": str(self.path), "out": str(self.out)}
        return settings | {"text": None if self.text is None else str(self.text)}

    def _save(self, selections: dict[str, Selections]) -> list[Path]:
        files = {name: self.out / f"selections-{name}.npz" for name in selections}
        for name, file in files.items():
            selections[name].save(file)
        return list(files.values())

    def _draw_importance(self, selections: dict[str, Selections], tokens: np.ndarray, tokenizer: Any) -> list[Path]:
        """Figures of the importance of each method that has recorded some, with the words of the text where known."""
        written = []
        for name, recorded in selections.items():
            if recorded.importance is None:
                continue
            importance = recorded.importance[:, 0]
            written += [self.out / f"importance-{name}.png", self.out / f"tokens-{name}.png"]
            plot_importance(importance, path=written[-2])
            known = min(len(tokens), importance.shape[-1])  # what was generated is not in the text
            plot_top_tokens(importance[..., :known], tokens[:known], tokenizer, path=written[-1])
        return written

    def _check(self) -> None:
        for name, least in (("prompt_length", 1), ("new_tokens", 2), ("batch", 1)):
            if getattr(self, name) < least:
                raise bad_value(f"--{name.replace('_', '-')}", f"must be >= {least}", getattr(self, name), "Raise it.")
        if not self.variants or "full" in self.variants:
            raise bad_value(
                "--variants", "must name methods that select blocks", list(self.variants), "nosa, infllmv2 and dma do."
            )

    def _read_tokens(self, model: NosaLM) -> np.ndarray:
        """Returns the tokens of the text that are read, and no more."""
        needed = self.prompt_length + (0 if self.free_running else self.new_tokens)
        if self.text is None:
            text = (
                bytes(read_corpus().heldout[: 16 * needed]).decode("utf-8", errors="ignore").encode()
            )  # whole characters
        else:
            text = train.read_text(self.text, argument="--text").tobytes()
        tokenizer = tokenizer_of(model.origin.files, model.config.vocab_size, self.path)
        tokens = np.asarray(encode(tokenizer, text, "the text")[:needed], np.int32)
        if len(tokens) < needed:
            raise bad_value(
                "--text", f"must have at least {needed} tokens", len(tokens), "Lower --prompt-length or --new-tokens."
            )
        return tokens


def _plain(costs: dict[str, dict[int, Plan]]) -> dict[str, Any]:
    return {name: {str(slots): cost.to_dict() for slots, cost in plans.items()} for name, plans in costs.items()}


def as_json(reports: dict[str, LocalityReport]) -> dict[str, Any]:
    """The reports in plain types, by name of the method."""
    return {name: report.to_dict() for name, report in reports.items()}


def write_json(path: Path, content: Any) -> Path:
    """Writes `content` and returns `path`."""
    with replacing(path) as file:
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path
