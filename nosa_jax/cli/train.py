"""`nosa train`: local text in, checkpoints and a Hugging Face folder out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import nosa_jax
from nosa_jax import NosaLM, parallel, processes, train
from nosa_jax._extras import require_extras
from nosa_jax.cli.data import (
    Format,
    Found,
    ShardDtype,
    describe,
    find_data,
    origin_with,
    read_corpus,
    read_source,
    read_tokenizer,
)
from nosa_jax.cli.flags import called
from nosa_jax.cli.plan import PresetName, preset
from nosa_jax.cli.terminal import facts, heading, working
from nosa_jax.config import ModelConfig, Variant
from nosa_jax.hf import ByteTokenizer, FileTokenizer
from nosa_jax.hf.load import outline
from nosa_jax.hf.save import check_folder
from nosa_jax.hf.text import tokenizer_of
from nosa_jax.model import Remat
from nosa_jax.origin import Origin
from nosa_jax.train import OptimizerConfig, TrainConfig, TrainResult
from nosa_jax.train.folder import CHECKPOINTS_NAME, LOG_NAME, MODEL_NAME, check_run_folder
from nosa_jax.train.optim import UNUSED
from pallas_kernels.checks import bad_value

with contextlib.suppress(ImportError):  # `main` says what is missing, and until then no annotation is looked at
    from tyro.conf import UseAppendAction  # a flag that is given again adds to what it was given before


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a model on local text, fresh or from a checkpoint, and save it as a Hugging Face folder."""

    preset: PresetName | None = None
    """Shape of a fresh model; default: tiny."""
    variant: Variant | None = None
    """How the model selects blocks; default: what --init or --config-file say, else nosa."""
    init: Path | None = None
    """Hugging Face folder to start from, whose shape and tokenizer are taken; default: fresh weights of --preset."""
    stage: Literal["pretrain", "continued", "sft"] | None = None
    """Settings of a stage of the paper's pipeline, instead of the defaults below; flags with another value win."""
    config_file: Path | None = None
    """Run in a JSON or TOML file (TrainConfig.save); flags that are given with another value than their default win."""

    files: UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """Files, folders or globs to read as bytes; default: the source of Python's standard library."""
    data: UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """Files, folders or globs of --format instead, read with the tokenizer of --init or --tokenizer."""
    weights: tuple[float, ...] = ()
    """One for each --data: they are mixed, each with this share of the rows; default: all are one text."""
    format: tuple[Format, ...] = ("auto",)
    """What --data are: text, jsonl, tokens (.npy, .bin) or chat; auto: by how names end. One, or one per weight."""
    field: str | None = None
    """Where lines of JSON have their text; default: text."""
    template: Path | None = None
    """File with the Jinja template of chats; default: that of the tokenizer's folder."""
    token_dtype: ShardDtype | None = None
    """Dtype of the tokens in .bin files; default: uint16."""
    tokenizer: Path | None = None
    """Folder with tokenizer.json, or that file; default: that of --init, else bytes."""
    end_of_text: int | None = None
    """Token id that ends documents; default: what the tokenizer's folder says."""
    pack: bool = True
    """Whether rows of --data hold whole documents, each on its own; else windows of the text as one."""
    heldout_fraction: float = 0.05
    """Share of the text, in whole files where that comes close, that is not trained on but evaluated."""
    out: Path | None = None
    """Folder for checkpoints, log and model; default: runs/PRESET-VARIANT."""
    resume: bool = False
    """Continue from the newest checkpoint in the folder of --out; from the start where there is none."""

    mesh: str = ""
    """Devices that share the work, such as data=2,fsdp=4: axes data, fsdp, tensor and context; default: one device."""
    distributed: bool = False
    """Join the other processes of a cluster that JAX knows (Slurm, Kubernetes, Open MPI)."""
    coordinator: str | None = None
    """Host and port of the first of several processes, where JAX cannot know."""
    num_processes: int | None = None
    """How many processes there are; with --coordinator."""
    process_id: int | None = None
    """Which of them this is, from 0; with --coordinator."""

    steps: int = TrainConfig.steps
    """Steps of the whole run, the horizon of the learning rate."""
    batch_size: int = TrainConfig.batch_size
    """Windows of text per step."""
    length: int = TrainConfig.length
    """Tokens per window."""
    accumulate: int = TrainConfig.accumulate
    """Parts that a batch is split into to save memory."""
    remat: Remat = TrainConfig.remat
    """Recompute each layer in the backward pass: slower, in less memory."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = TrainConfig.compute_dtype
    """Dtype of the forward and backward pass; auto: float32 on a CPU, bfloat16 elsewhere."""
    seed: int = TrainConfig.seed
    """Seed of the initial weights and of the order of the text."""
    log_every: int = TrainConfig.log_every
    """Steps between two records of the log."""
    eval_every: int = TrainConfig.eval_every
    """Steps between two evaluations; 0: only at the end."""
    eval_batches: int = TrainConfig.eval_batches
    """Held-out batches per evaluation, at most."""
    eval_selection: bool = TrainConfig.eval_selection
    """Whether evaluations of sparse variants measure gamma, misses and bias, too."""
    checkpoint_every: int = TrainConfig.checkpoint_every
    """Steps between two checkpoints; 0: only at the end."""
    keep_checkpoints: int = TrainConfig.keep_checkpoints
    """How many of the newest checkpoints stay."""
    keep_every: int = TrainConfig.keep_every
    """Checkpoints of steps that this divides stay, too; 0: none."""
    trainable: tuple[str, ...] = ("*",)
    """Glob patterns over the names of the parameters that train; or: everything, importance."""
    loss_chunk: int | None = TrainConfig.loss_chunk
    """Positions of each row whose logits are made at a time; default: by memory."""
    z_loss: float = TrainConfig.z_loss
    """Weight of the squared logarithm of the softmax's denominator in the loss."""
    max_skipped: int = TrainConfig.max_skipped
    """Steps in a row whose loss or gradient is not finite, after which the run ends."""

    profile_steps: tuple[int, int] | None = TrainConfig.profile_steps
    """First and last step of a trace for TensorBoard's profiler, in profile/ of the folder."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where the log's numbers go besides: tensorboard, wandb."""

    learning_rate: float = OptimizerConfig.learning_rate
    """Learning rate of the stable phase of the schedule."""
    final_learning_rate: float = OptimizerConfig.final_learning_rate
    """Learning rate that the last step reaches."""
    warmup_fraction: float = OptimizerConfig.warmup_fraction
    """Share of the steps, the first ones, in which the learning rate rises."""
    decay_fraction: float = OptimizerConfig.decay_fraction
    """Share of the steps, the last ones, in which the learning rate falls."""
    beta1: float = OptimizerConfig.beta1
    """Adam's decay of the first moment."""
    beta2: float = OptimizerConfig.beta2
    """Adam's decay of the second moment."""
    epsilon: float = OptimizerConfig.epsilon
    """Adam's term against division by zero."""
    weight_decay: float = OptimizerConfig.weight_decay
    """Matrices are pulled towards 0 by this times the learning rate."""
    clip_norm: float = OptimizerConfig.clip_norm
    """Gradients with a larger norm are scaled down to it."""
    schedule: Literal["wsd", "cosine", "constant"] = OptimizerConfig.schedule
    """Course of the learning rate: warmup, stable and decay; half a cosine; or no decay."""
    moment_dtype: Literal["float32", "bfloat16"] = OptimizerConfig.moment_dtype
    """Dtype in which Adam's moments are kept."""
    learning_rate_multipliers: tuple[tuple[str, float], ...] = OptimizerConfig.learning_rate_multipliers
    """Patterns over names of parameters, each with a factor of the learning rate."""
    weight_decays: tuple[tuple[str, float], ...] = OptimizerConfig.weight_decays
    """Patterns over names of parameters, each with the weight decay of what it matches."""
    clip_norms: tuple[tuple[str, float], ...] = OptimizerConfig.clip_norms
    """Patterns over names of parameters, each with the norm that their gradients are scaled down to."""

    def config(self, model: ModelConfig | None = None) -> TrainConfig:
        """The run that the flags describe, of a model's configuration or of a fresh one."""
        given = self._fresh() if model is None else model
        if self._file is not None:
            base = dataclasses.replace(self._file, model=given)
        elif self.stage is not None:
            tokens = self.steps * self.batch_size * self.length
            recipe: Any = getattr(train, self.stage)
            own = {"variant": given.attention.variant} if self.stage == "continued" else {}
            base = recipe(given, tokens=tokens, batch_size=self.batch_size, length=self.length, **own)
        else:
            optimizer = OptimizerConfig(**self._fields_of(OptimizerConfig))
            return TrainConfig(given, optimizer, **self._fields_of(TrainConfig))
        changed = self._changed(OptimizerConfig)
        if "schedule" in changed:  # what the one of the base needed, and this one has no use for
            changed = {name: getattr(OptimizerConfig, name) for name in UNUSED.get(self.schedule, ())} | changed
        optimizer = dataclasses.replace(base.optimizer, **changed)
        return dataclasses.replace(base, optimizer=optimizer, **self._changed(TrainConfig))

    @functools.cached_property
    def _file(self) -> TrainConfig | None:
        return None if self.config_file is None else TrainConfig.load(self.config_file)

    def _variant(self) -> Variant | None:
        """The one that is asked for, None for that of --init or for the default."""
        if self.variant is not None:
            return self.variant
        if self.stage is not None:
            of_stages: dict[str, Variant | None] = {"pretrain": "full", "continued": "nosa", "sft": None}
            return of_stages[self.stage]
        return None if self._file is None else self._file.model.attention.variant

    def _fresh(self) -> ModelConfig:
        """The model of --config-file or --preset."""
        if self._file is None or self.preset is not None:
            return preset(self.preset or "tiny", self._variant() or "nosa")
        return self._file.model.with_attention(variant=self._variant())

    def _fields_of(self, cls: Any) -> dict[str, Any]:
        names = [field.name for field in dataclasses.fields(cls) if field.name not in ("model", "optimizer")]
        return {name: getattr(self, name) for name in names}

    def _changed(self, cls: Any) -> dict[str, Any]:
        """The settings with another value than their flag's default."""
        return {name: value for name, value in self._fields_of(cls).items() if value != getattr(Train, name)}

    def run(self) -> int:
        require_extras("train", "hf")
        self._check()
        if self.out is not None:
            _check_out(self.out)
        if self.distributed or (self.coordinator, self.num_processes, self.process_id) != (None, None, None):
            parallel.initialize(self.coordinator, self.num_processes, self.process_id)
        sizes: Any = as_sizes(self.mesh)
        mesh = parallel.make_mesh(**sizes) if self.mesh else None
        model = None  # of shapes: the run loads the weights itself, where it starts from them
        if self.init is not None:
            with called("--init", "path"):
                model = outline(self.init, variant=self._variant())
        given = self._fresh() if model is None else model.config
        found = find_data(self.data, self.weights, self.format) if self.data else []
        tokenizer, written = self._tokenizer(model, given.vocab_size, [kind for kind, _ in found])
        if self.init is None and self._file is None and written is not None:
            # A fresh model has no tokens of its own: it gets room for those of --tokenizer.
            given = dataclasses.replace(given, vocab_size=max(given.vocab_size, written.vocab_size))
        config = self.config(given)
        out = self.out or Path("runs", f"{self._start()}-{config.model.attention.variant}")
        _check_out(out)
        source: Any = self._source(found, tokenizer, config)
        origin = None
        if self.data:  # before the run, which would be done when this fails
            told = (written, self.tokenizer, self.template, self.end_of_text)
            origin = origin_with(Origin() if model is None else model.origin, *told)
        if processes.is_writer():
            heading(f"Training {out.resolve().name} ({config.model.attention.variant}) for {config.steps} steps")
            facts([("text", describe(source)), ("folder", out)])
        result = train.train(
            config, source, out, model=self.init, mesh=mesh, resume=self.resume, trackers=self.trackers
        )
        if origin is not None:
            result.model.origin, written = origin, None
        with working("writing the model"):
            nosa_jax.save_pretrained(result.model, out / MODEL_NAME, tokenizer=written)
        if processes.is_writer():
            self._report(result, out)
        return 130 if result.interrupted else 0

    def _check(self) -> None:
        """Raises ValueError for flags that contradict each other, or that would have no effect."""
        if self.init is not None and self.preset is not None:
            remedy = "Leave one out: the folder says its shape."
            raise bad_value("--preset", "must not be given with --init", self.preset, remedy)
        if self.stage is not None and self.config_file is not None:
            raise bad_value("--stage", "must not be given with --config-file", self.stage, "Leave one out.")
        if self.stage == "pretrain" and self.variant not in (None, "full"):
            remedy = "Leave it out; --stage continued is the one that goes on with it."
            raise bad_value("--variant", "must be full in --stage pretrain", self.variant, remedy)
        if self.files and self.data:
            raise bad_value("--files", "must not be given with --data", "both", "Give one of them.")
        names = ("weights", "format", "field", "template", "token_dtype", "tokenizer", "end_of_text")
        useless = [name for name in names if getattr(self, name) != getattr(Train, name)]
        if useless and not self.data:
            rule = f"must be given with --{useless[0].replace('_', '-')}"
            raise bad_value("--data", rule, "none", "Give --data; --files are read as bytes.")

    def _start(self) -> str:
        """What the run starts from, as a name for its folder."""
        if self.init is not None:
            return self.init.resolve().name
        return self.preset or ("tiny" if self.config_file is None else self.config_file.stem)

    def _source(self, found: Found, tokenizer: Any, config: TrainConfig) -> Any:
        if not found:
            return read_corpus(tuple(itertools.chain(*self.files)), self.heldout_fraction)
        return read_source(
            found,
            tokenizer,
            weights=self.weights,
            end_of_text=self.end_of_text,
            field=self.field,
            template=self.template,
            token_dtype=self.token_dtype,
            length=config.length,
            block_size=config.model.attention.block_size,
            pack=self.pack,
            heldout_fraction=self.heldout_fraction,
        )

    def _tokenizer(
        self, model: NosaLM | None, vocab_size: int, kinds: Sequence[Format]
    ) -> tuple[Path | None, ByteTokenizer | FileTokenizer | None]:
        """Where the tokenizer of --data is, None for bytes; and the one to write, None for what --init brings along.

        kinds: of --data. Of token ids alone nobody knows what they stand for.
        """
        own = model is not None and "tokenizer.json" in model.origin.files
        if not self.data:
            if own:
                assert model is not None and self.init is not None
                found = tokenizer_of(model.origin.files, vocab_size, self.init)
                if not isinstance(found, ByteTokenizer):
                    rule = "must be given where --init brings a tokenizer"
                    raise bad_value("--data", rule, "none", "Pass the text as --data; --files are read as bytes.")
            return None, ByteTokenizer()
        if self.tokenizer is not None:
            return self.tokenizer, read_tokenizer(self.tokenizer, vocab_size)
        if own:
            return self.init, None
        if model is not None and vocab_size > ByteTokenizer.vocab_size and any(kind != "tokens" for kind in kinds):
            rule = f"must be given for text where --init brings no tokenizer.json for its vocabulary of {vocab_size}"
            remedy = "Name the folder of the original, or pass token ids as --data. (256 would be bytes.)"
            raise bad_value("--tokenizer", rule, "none", remedy)
        fits = vocab_size == ByteTokenizer.vocab_size
        if model is None and any(kind != "tokens" for kind in kinds):
            fits = vocab_size >= ByteTokenizer.vocab_size
        return None, ByteTokenizer() if fits else None

    def _report(self, result: TrainResult, out: Path) -> None:
        heading(f"{'Interrupted' if result.interrupted else 'Done'} after step {result.step}")
        bits = result.evaluations[-1].get("bits_per_byte") if result.evaluations else None
        facts(
            [
                ("held-out loss", "not evaluated" if bits is None else f"{bits:.4f} bits per byte"),
                ("checkpoints", f"{out / CHECKPOINTS_NAME} (the same command with --resume continues)"),
                ("log", out / LOG_NAME),
                ("model", f'{out / MODEL_NAME} (nosa generate {out / MODEL_NAME} --prompt "...")'),
            ]
        )


def as_sizes(mesh: str) -> dict[str, int]:
    """The sizes of a mesh's axes from text such as "data=2,fsdp=4". Raises ValueError for anything else but nothing."""
    sizes: dict[str, int] = {}
    for part in mesh.split(",") if mesh else ():
        name, equals, size = part.strip().partition("=")
        whole = size.strip().removeprefix("-").isdecimal()
        if name not in parallel.AXES or not equals or not whole or name in sizes:
            rule = f"must be sizes of axes among {', '.join(parallel.AXES)}, each once"
            raise bad_value("--mesh", rule, repr(mesh), "Write --mesh fsdp=4,tensor=2, for example.")
        sizes[name] = int(size)
    return sizes


def _check_out(out: Path) -> None:
    """Raises ValueError or FileExistsError for a folder that is not to be written into."""
    check_folder(out / MODEL_NAME)
    check_run_folder("--out", out)
