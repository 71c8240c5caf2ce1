"""`nosa eval`: how well a checkpoint reads long contexts, task by task and length by length."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Literal

from nosa_jax import evals, train
from nosa_jax._extras import require_extras
from nosa_jax._paths import only_run
from nosa_jax.cli.checkpoint import Dtype, load, note_attended, note_context
from nosa_jax.cli.policy import PolicyName, cache_of, require_whole_prompts, variant_of
from nosa_jax.cli.terminal import facts, heading, indented, note, note_replaced, working
from nosa_jax.config import Variant
from nosa_jax.evals.examples import find_task
from nosa_jax.hf.text import tokenizer_of
from pallas_kernels.checks import bad_value, require_int

_FILES = ("evals.json", "evals.png")


@dataclasses.dataclass(frozen=True)
class Eval:
    """Let a checkpoint answer questions about long texts that code makes, and score the answers.

    The score is that of answers by greedy decoding; beside it stands how likely the model finds the right answer when
    it is put in front of it (teacher forcing).
    """

    path: Path
    """Folder with config.json and *.safetensors; tokenizer.json too, unless tokens are bytes (vocabulary 256)."""
    tasks: tuple[str, ...] = ("niah_single", "mqar")
    """Tasks, or `all`: niah_single, niah_multikey, niah_multivalue, niah_multiquery, variable_tracking, common_words,
    frequent_words, mqar, kv_json, extract_records."""
    lengths: tuple[int, ...] = (1024, 4096)
    """Tokens of prompt and answer together."""
    count: int = 50
    """Examples of each task and length."""
    seed: int = 0
    """Seed of the examples."""
    generation: bool = True
    """Whether the model answers itself; without, only teacher forcing is measured."""
    haystack: Path | None = None
    """Text file to hide things in; default: docstrings of Python's standard library."""
    chat: bool = False
    """Wrap prompts in the model's chat template."""
    offload: bool = True
    """Whether the KV cache lives in host memory, with a pool of blocks on the device."""
    slots: int | None = None
    """Size of the pool on the device, in blocks; default: 5/4 of the blocks that a query selects."""
    policy: PolicyName | None = None
    """Another system's way to decode with a dense model (variant full), in place of attention to everything."""
    policy_settings: tuple[str, ...] = ()
    """Settings of the policy, as budget=1536 local_chunks=16; default: those of the comparison in the NOSA paper."""
    batch_size: int | None = None
    """Examples that are read together; default: at most 16 and 65536 tokens."""
    chunk: int | None = None
    """Tokens of a prompt read at once before decoding; default: all. Less needs less memory."""
    prefill: Literal["sparse", "dense"] = "sparse"
    """How prompts are read before an answer: as the variant attends, or with dense attention (no teacher forcing)."""
    variant: Variant | None = None
    """How blocks are selected; default: what the checkpoint says, full with a policy."""
    dtype: Dtype = "auto"
    """Dtype of weights and cache; auto: float32 on a CPU, bfloat16 elsewhere."""
    output: Path = Path("evals-output")
    """Folder for the table as JSON and its picture."""

    def run(self) -> int:
        require_extras("hf", "plots", "train")
        for name in ("count", "batch_size"):
            if getattr(self, name) is not None:
                require_int(f"--{name.replace('_', '-')}", getattr(self, name), 1)
        if not self.tasks or not self.lengths:
            raise bad_value("--tasks", "and --lengths must not be empty", "nothing", "Name at least one of each.")
        tasks = tuple(evals.TASKS) if self.tasks == ("all",) else self.tasks
        for task in tasks:
            find_task(task)
        cache = cache_of(self.offload, self.slots, self.policy, self.policy_settings)
        require_whole_prompts(self.policy, self.chunk)
        if not self.generation and (self.policy is not None or self.prefill == "dense"):
            rule = "must not go with --policy or --prefill dense, which only answers show"
            given = "--prefill dense" if self.policy is None else f"--policy {self.policy}"
            raise bad_value("--no-generation", rule, given, "Leave out one.")
        haystack = None
        if self.haystack is not None:
            haystack = train.read_text(self.haystack, argument="--haystack").tobytes().decode("utf-8", errors="replace")
        model = load(self.path, variant_of(self.variant, self.policy), self.dtype)
        tokenizer = tokenizer_of(model.origin.files, model.config.vocab_size, self.path)
        with only_run("--output", self.output):
            note_context(model, max(self.lengths))
            if cache.policy is not None:
                note_attended(str(self.policy), cache.policy.num_attended, max(self.lengths))
            with working(f"evaluating {self.count} examples of each task and length"):
                table = evals.evaluate(
                    model,
                    tokenizer,
                    tasks,
                    self.lengths,
                    self.count,
                    self.seed,
                    generation=self.generation,
                    cache=cache,
                    batch_size=self.batch_size,
                    prefill=self.prefill,
                    prefill_chunk=self.chunk,
                    haystack=haystack,
                    chat=self.chat,
                    label=self.path.name or str(self.path),
                    told=self._keep,
                )
            heading(f"{table.label}: {model.config.attention.variant}, {self.count} examples each")
            indented(str(table))
            written = [self.output / name for name in _FILES]
            table.plot(written[1])
        heading("Written")
        facts((path.name, path) for path in written)
        return 0

    def _keep(self, table: evals.Table) -> None:
        """Writes what is there, so that an interrupt loses no more than one task at one length."""
        file = self.output / _FILES[0]
        if len(table.rows) == 1:
            note_replaced(file)
        table.save(file)
        if not sys.stderr.isatty():  # a terminal has a bar
            row = table.rows[-1]
            note(f"{row['task']} at {row['length']} tokens is done and kept")
