"""`nosa demo`: train on real text, decode with the cache in host memory, compare bits, measure locality, draw."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

import nosa_jax
from nosa_jax import CacheConfig, Generation, NosaLM, Sampling, presets, train
from nosa_jax._extras import require_extras
from nosa_jax._paths import only_run
from nosa_jax.cli.data import describe, read_corpus
from nosa_jax.cli.locality import as_json, write_json
from nosa_jax.cli.terminal import Timer, duration, facts, heading, indented, show, size, working
from nosa_jax.decode import room_for
from nosa_jax.environment import environment
from nosa_jax.hf.save import check_folder
from nosa_jax.locality import comparison_table, draw, record
from nosa_jax.train import Corpus, OptimizerConfig, TrainConfig
from pallas_kernels.checks import bad_value
from pallas_kernels.device import current_device

_COMPARED = ("logits", "tokens", "block_ids")
_SHOWN_LINES, _SHOWN_COLUMNS = 8, 90


@dataclasses.dataclass(frozen=True)
class Demo:
    """Train a tiny model on Python's standard library, decode it with its cache in host memory, and show what happens.

    Takes a few minutes on two CPU cores. Exits with 1 if offloaded decoding is not bit-identical to decoding on the
    device.
    """

    out: Path = Path("demo-output")
    """Folder for the checkpoint, the figures and the results as JSON; what is there from before is replaced."""
    steps: int = 200
    """Training steps on short windows of text; a third as many on long ones follow. Fewer learn less."""
    prompt_length: int = 512
    """Bytes of held-out text to continue."""
    new_tokens: int = 256
    """Bytes to generate."""
    slots: tuple[int, ...] = (8, 10, 16)
    """Sizes of the device pool, in blocks, that are compared with a cache that is all on the device."""
    locality_tokens: int = 512
    """Held-out bytes after the prompt over which locality is measured."""
    temperature: float = 0.8
    """Temperature of the sampling; 0 always takes the likeliest byte."""
    seed: int = 0
    """Seed of the weights, of the order of the text and of the sampling."""

    def run(self) -> int:
        require_extras("train", "hf", "plots")
        self._check()
        check_folder(self.out / "model")
        with only_run("--out", self.out):
            return self._run()

    def _run(self) -> int:
        timer = Timer()
        heading("nosa demo: sparse attention with the KV cache in host memory, from training to figures")
        facts([("device", current_device().kind), ("output", self.out.resolve())])

        heading("1/5  Training")
        with timer.part("training"):
            corpus = read_corpus()
            window = _window(corpus.heldout, self.prompt_length, self.new_tokens, self.locality_tokens)
            model, training = self._train(corpus)
        prompt, following = window[: self.prompt_length], window[self.prompt_length :]

        heading("2/5  Generating, the cache in host memory")
        with timer.part("generating"):
            cache = CacheConfig(slots=sorted(self.slots)[len(self.slots) // 2])
            offloaded = self._generate(model, prompt, cache)
            text = self._show_text(model, prompt, cache, offloaded)

        heading("3/5  The same bits as on the device?")
        with timer.part("comparing"):
            runs = self._compare(model, prompt)
        identical = all(run["identical"] for run in runs)
        if identical:
            indented("bit-identical: yes")
        else:
            indented("bit-identical: NO. Offloading changed the result; please report this with the output above.")

        heading("4/5  How local the selections are")
        with timer.part("locality"):
            reports, figures = self._measure(model, prompt, following[: self.locality_tokens])

        heading("5/5  Written")
        with timer.part("writing"):
            with working("writing the model"):
                nosa_jax.save_pretrained(model, self.out / "model")
            results = {
                "environment": environment(),
                "settings": dataclasses.asdict(self) | {"out": str(self.out)},
                "training": training,
                "generation": {"prompt": _text(prompt), "text": text},
                "bit_identical": identical,
                "runs": runs,
                "locality": reports,
            }
        results["timings"] = timer.parts
        written = [self.out / "model", *figures, write_json(self.out / "results.json", results)]
        facts((path.name, path) for path in written)
        parts = ", ".join(f"{name} {duration(part['seconds'])}" for name, part in timer.parts.items())
        indented(f"\n{duration(timer.seconds)} in all: {parts}")
        indented(f'Next: nosa generate {self.out / "model"} --temperature 0.8 --prompt "def "')
        return 0 if identical else 1

    def _check(self) -> None:
        for name, least in (("prompt_length", 1), ("new_tokens", 2), ("locality_tokens", 2)):
            if getattr(self, name) < least:
                raise bad_value(f"--{name.replace('_', '-')}", f"must be >= {least}", getattr(self, name), "Raise it.")
        if not self.slots:
            raise bad_value("--slots", "must name at least one size", self.slots, "8 10 16 are good.")
        for slots in self.slots:
            CacheConfig(slots=slots).resolve_slots(presets.tiny().attention, slots)
        Sampling(self.temperature)

    def _train(self, corpus: Corpus) -> tuple[NosaLM, dict[str, Any]]:
        """Most steps on short windows, which are cheap, then some on windows as long as what is decoded later."""
        tiny, seed = presets.tiny(), self.seed
        rise, fall = OptimizerConfig(decay_fraction=0.0), OptimizerConfig(2e-3, warmup_fraction=0.1, decay_fraction=0.8)
        window: dict[str, Any] = {"batch_size": 8, "length": tiny.max_context // 4, "log_every": 5, "eval_every": 0}
        short = TrainConfig(tiny, rise, self.steps, seed=seed, **window)
        window |= {"batch_size": 2, "length": tiny.max_context}
        long = TrainConfig(tiny, fall, max(self.steps // 3, 1), seed=seed + 1, **window)
        attention = tiny.attention
        facts(
            [
                ("text", f"the source of Python's standard library as bytes: {describe(corpus)}"),
                (
                    "model",
                    f"{tiny.num_layers} layers of {tiny.hidden_size}; each query selects "
                    f"{attention.num_selected_blocks} blocks of {attention.block_size} bytes",
                ),
                ("steps", f"{short.steps} on windows of {short.length} bytes, then {long.steps} of {long.length}"),
            ]
        )
        text, model = dataclasses.replace(corpus, heldout=corpus.heldout[:0]), None
        history: list[list[dict[str, Any]]] = []
        for config in (short, long):
            result = train.train(config, text, model=model)
            if result.interrupted:
                raise KeyboardInterrupt
            model, history = result.model, [*history, result.history]
        with working("evaluating"):
            heldout = train.evaluate(model, corpus.heldout, batch_size=long.batch_size, length=long.length)
        indented(f"held-out loss: {heldout.bits_per_byte:.3f} bits per byte, over {heldout.tokens:,} bytes")
        return result.model, {"held_out": dataclasses.asdict(heldout), "steps": history}

    def _generate(self, model: NosaLM, prompt: np.ndarray, cache: CacheConfig) -> Generation:
        where = f"{cache.slots} slots" if cache.offload else "the whole cache on the device"
        with working(f"compiling and decoding {self.new_tokens} bytes, {where}"):
            generation = nosa_jax.generate(
                model,
                prompt[None],
                max_new_tokens=self.new_tokens,
                cache=cache,
                sampling=Sampling(self.temperature),
                key=jax.random.key(self.seed),
                record=True,
            )
            return jax.block_until_ready(generation)

    def _show_text(self, model: NosaLM, prompt: np.ndarray, cache: CacheConfig, generation: Generation) -> str:
        room = room_for(len(prompt), self.new_tokens)
        plan = nosa_jax.plan(model.config, 1, room, cache, dtype=model.embed.dtype)
        facts(
            [
                ("on the host", f"{plan.num_blocks} blocks of {model.config.attention.block_size} tokens per layer and "
                 f"KV head, {size(plan.host_bytes)}"),
                ("on the device", f"{plan.slots} of them, {size(plan.device['pool'])}"),
                ("prompt", f"{len(prompt)} bytes of held-out text, of which the end is shown"),
            ]
        )  # fmt: skip
        text = _text(np.asarray(generation.tokens)[0])
        show()
        for line in _lines(_text(prompt))[-_SHOWN_LINES:]:
            show(f"  prompt | {line}".rstrip())
        for line in _lines(text):
            show(f"  model  > {line}".rstrip())
        return text

    def _compare(self, model: NosaLM, prompt: np.ndarray) -> list[dict[str, Any]]:
        """Decodes with the whole cache on the device, then with pools of every size; prints one line for each."""
        reference = self._generate(model, prompt, CacheConfig(offload=False))
        print_row = lambda *cells: indented(f"{cells[0]:<28}{cells[1]:<17}" + "".join(f"{x:<12}" for x in cells[2:]))
        print_row("cache", "fetched blocks", *_COMPARED)
        print_row("all on the device", "none", *("reference" for _ in _COMPARED))
        runs = []
        for slots in self.slots:
            generation = self._generate(model, prompt, CacheConfig(slots=slots))
            same = {name: same_bits(getattr(generation, name), getattr(reference, name)) for name in _COMPARED}
            fetched = float(np.asarray(generation.fetched)[..., 1:].mean())
            cells = ("same bits" if equal else "DIFFER" for equal in same.values())
            print_row(f"on the host, {slots} slots", f"{fetched:.2f} per step", *cells)
            runs.append({"slots": slots, "fetched_per_step": fetched, "same": same, "identical": all(same.values())})
        indented("fetched: per step, layer and KV head")
        return runs

    def _measure(self, model: NosaLM, prompt: np.ndarray, text: np.ndarray) -> tuple[dict[str, Any], list[Path]]:
        """Compares `nosa` with `infllmv2` on the same weights; returns the reports and the files drawn."""
        methods = {"nosa": model, "infllmv2": nosa_jax.with_attention(model, variant="infllmv2")}
        selections = {}
        for name, method in methods.items():
            with working(f"decoding {len(text)} bytes of held-out text with {name}"):
                selections[name] = record(method, prompt, len(text), text)
        with working("measuring"):
            reports = {name: chosen.report() for name, chosen in selections.items()}
        indented(
            f"The same {len(text)} bytes of held-out text for both, fed one by one after the prompt.\n"
            "The same weights too: those trained above as nosa. infllmv2 is\n"
            'nosa_jax.with_attention(model, variant="infllmv2"), not a model trained as such.\n'
        )
        indented(comparison_table(reports))
        with working("drawing"):
            return as_json(reports), draw(selections, reports, self.out)


def same_bits(left: Any, right: Any) -> bool:
    """Whether two arrays have the same shape, dtype and bits."""
    left, right = np.asarray(left), np.asarray(right)
    return left.shape == right.shape and left.dtype == right.dtype and left.tobytes() == right.tobytes()


def _window(heldout: np.ndarray, prompt_length: int, *lengths_after: int) -> np.ndarray:
    """Held-out bytes, int32: a prompt near the middle, up to a line that ends in a colon, and what follows it."""
    after = max(lengths_after)
    ends = np.flatnonzero((heldout[:-1] == ord(":")) & (heldout[1:] == ord("\n"))) + 2
    ends = ends[(ends >= prompt_length) & (ends + after <= len(heldout))]
    if not ends.size:
        raise bad_value(
            "--prompt-length",
            f"must, with the {after} bytes after it, fit into the held-out text of {len(heldout)} bytes",
            prompt_length,
            "Lower it.",
        )
    end = ends[ends.size // 2]
    return heldout[end - prompt_length : end + after].astype(np.int32)


def _text(tokens: np.ndarray) -> str:
    return bytes(tokens.tolist()).decode("utf-8", errors="replace")


def _lines(text: str) -> list[str]:
    """Lines of at most _SHOWN_COLUMNS characters, without any that would move the cursor."""
    lines = []
    for line in text.split("\n"):
        shown = "".join(char if char.isprintable() else "\N{MIDDLE DOT}" for char in line.expandtabs(4))
        lines += [shown[i : i + _SHOWN_COLUMNS] for i in range(0, max(len(shown), 1), _SHOWN_COLUMNS)]
    return lines if lines[-1] else lines[:-1]
