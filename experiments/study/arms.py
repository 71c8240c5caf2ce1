"""What is compared: every arm is one way to continue the same dense model on the same data.

An arm says which variant, budget, block size, start and stages; a size says what that is in tokens and steps.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx

from nosa_jax import NosaLM, train, with_attention
from nosa_jax.attention.importance import Importance
from nosa_jax.config import Variant
from nosa_jax.train import OptimizerConfig, Source, TrainConfig, TrainResult
from nosa_jax.train.importance import with_importance

Start = Literal["zero", "fit"]
Trained = Literal["everything", "importance", "all but importance"]
# Patterns of names; what none matches stays as it is.
TRAINED: dict[str, tuple[str, ...]] = {
    "everything": ("*",),
    "importance": ("*importance*",),
    "all but importance": ("embed", "norm", "layers.mlp*", "layers.*norm*", "layers.attention.[qo]*"),
}
FIT_ROWS = 8  # of training text, for a start that is fitted
# A at such a start. Steps of Adam are as long as the learning rate, so that a smaller A would change its sign in the
# first of them, and the order of what is selected with it; and a start that is good may move slowly.
FIT_SCALE = 0.02
FIT_RATES = (("*importance.A", 2.0), ("*importance*", 5.0))


@dataclasses.dataclass(frozen=True)
class Budget:
    """Blocks: selected in all (J), sink, local, and picked by the query; importance picks the rest."""

    selected: int
    sink: int
    local: int
    query: int


@dataclasses.dataclass(frozen=True)
class Size:
    """What the arms are made of on some machine.

    length: tokens of a row. block_size, stride: of blocks, and between pooled keys. budgets: by share of the blocks of
    a row of that length. dense_steps: that the dense model is trained before all arms. steps, batch_size,
    learning_rate, importance_factor: of training; the last one multiplies the learning rate of A and delta. documents,
    measured: held out for losses, and how many of them selections are recorded of, over the last `decode_steps` tokens
    of the document's first tokens, as many as `read` says. tasks, task_lengths, task_count: what is asked, after
    `tuning_steps` on like examples. dtype: of everything that is measured.
    """

    length: int
    block_size: int
    stride: int
    budgets: dict[str, Budget]
    dense_steps: int
    steps: int
    batch_size: int
    learning_rate: float
    importance_factor: float
    documents: int
    measured: int
    decode_steps: int
    read: tuple[int, ...]
    tasks: tuple[str, ...]
    task_lengths: tuple[int, ...]
    task_count: int
    tuning_steps: int
    dtype: Any


GPU = Size(
    length=8192, block_size=64, stride=16,
    budgets={"quarter": Budget(32, 1, 9, 8), "eighth": Budget(16, 1, 5, 4), "half": Budget(64, 1, 17, 15)},
    dense_steps=300, steps=250, batch_size=4, learning_rate=1e-4, importance_factor=50.0,
    documents=128, measured=8, decode_steps=192, read=(4096, 8192),
    tasks=("niah_single", "niah_multikey", "niah_multivalue", "kv_json", "mqar", "extract_records",
           "variable_tracking"),
    task_lengths=(4096, 8192), task_count=40, tuning_steps=80, dtype=jnp.bfloat16,
)  # fmt: skip
CPU = Size(
    length=512, block_size=16, stride=4,
    budgets={"quarter": Budget(8, 1, 3, 2), "eighth": Budget(4, 1, 2, 1), "half": Budget(16, 1, 5, 4)},
    dense_steps=600, steps=60, batch_size=4, learning_rate=1e-3, importance_factor=10.0,
    documents=48, measured=4, decode_steps=96, read=(512,),
    tasks=(), task_lengths=(), task_count=0, tuning_steps=0, dtype=jnp.float32,
)  # fmt: skip
SIZES = {"gpu": GPU, "cpu": CPU}


@dataclasses.dataclass(frozen=True)
class Stage:
    """A share of an arm's steps, its first, that are trained in another way.

    every_block: whether all blocks are selected, so that every token gets a gradient through its bias. query_share,
    trained: as in `Arm`.
    """

    share: float
    every_block: bool = False
    query_share: float | None = None
    trained: Trained = "everything"


@dataclasses.dataclass(frozen=True)
class Arm:
    """name: in tables. budget: a name in `Size.budgets`. query_share: of J, picked by the query, or all that sink and
    window leave; None as the budget has it. halves: blocks of half the size and twice as many of them. start: A = 0 as
    the paper has it, or `train.fit_importance`. stages: how its first steps are trained. trained: what is, in the other
    steps. rate, importance_rate: multiply the learning rate, and that of A and delta once more. times: multiplies the
    steps. asked: whether it is asked tasks. seeds: that the arm is run with."""

    name: str
    variant: Variant
    budget: str = "quarter"
    query_share: float | None = None
    halves: bool = False
    start: Start = "zero"
    stages: tuple[Stage, ...] = ()
    trained: Trained = "everything"
    rate: float = 1.0
    importance_rate: float = 1.0
    times: float = 1.0
    asked: bool = False
    seeds: tuple[int, ...] = (0,)

    def attention(self, size: Size) -> dict[str, Any]:
        """Fields of AttentionConfig."""
        budget, parts = size.budgets[self.budget], 2 if self.halves else 1
        query = budget.query if self.query_share is None else round(self.query_share * budget.selected)
        query = min(query, budget.selected - budget.sink - budget.local)
        return {
            "variant": self.variant,
            "block_size": size.block_size // parts,
            "pooling_stride": size.stride,
            "pooling_window": 2 * size.stride,
            "num_selected_blocks": parts * budget.selected,
            "num_sink_blocks": parts * budget.sink,
            "num_local_blocks": parts * budget.local,
            "num_query_blocks": parts * query,
        }

    def attention_of(self, stage: Stage, size: Size) -> dict[str, Any]:
        """Fields of AttentionConfig in a stage."""
        fields = dataclasses.replace(self, query_share=stage.query_share or self.query_share).attention(size)
        return fields | ({"num_selected_blocks": size.length // fields["block_size"]} if stage.every_block else {})


THREE = (0, 1, 2)
VARIANTS = tuple(Arm(name, name, asked=True, seeds=THREE) for name in ("full", "infllmv2", "nosa", "dma"))
STARTS = (
    Arm("nosa, fitted start", "nosa", start="fit", asked=True),
    # The first of these stages leaves nothing for importance to pick, and so selects as InfLLMv2 does.
    Arm(
        "nosa, query share annealed",
        "nosa",
        stages=(Stage(0.25, query_share=1.0), Stage(0.25, query_share=0.5)),
        asked=True,
    ),
    Arm("nosa, importance first", "nosa", stages=(Stage(0.25, every_block=True, trained="importance"),), asked=True),
)
BUDGETS = tuple(
    Arm(f"{variant}, {budget}", variant, budget, asked=True)
    for budget in ("eighth", "half")
    for variant in ("infllmv2", "nosa")
)
ABLATIONS = (
    *(Arm(f"nosa, query share {share}", "nosa", query_share=share, asked=True) for share in (0.125, 0.375, 0.5)),
    *(Arm(f"{variant}, half blocks", variant, halves=True) for variant in ("infllmv2", "nosa")),
    Arm("nosa, importance alone", "nosa", trained="importance"),
    Arm("nosa, fitted start, importance alone", "nosa", start="fit", trained="importance"),
    Arm("nosa, fitted start, importance fixed, no bias", "nosa", start="fit", trained="all but importance"),
)
RATES = (
    *(Arm(f"nosa, importance rate x {x:g}", "nosa", importance_rate=x) for x in (0.2, 4.0)),
    *(Arm(f"{variant}, rate x {x:g}", variant, rate=x) for x in (3.0, 0.3) for variant in ("nosa", "infllmv2", "full")),
)
LONG = tuple(  # 30M tokens where a row has 8,192
    Arm(f"{variant}, 30M tokens, rate x 3", variant, rate=3.0, times=3.66, asked=True)
    for variant in ("full", "infllmv2", "nosa", "dma")
)
ARMS = (*VARIANTS, *STARTS, *BUDGETS, *ABLATIONS, *RATES, *LONG)


def started(dense: NosaLM, arm: Arm, size: Size, source: Source, seed: int) -> NosaLM:
    """The model that an arm begins with. seed: of a delta that nothing else decides."""
    model = with_attention(dense, **arm.attention(size))
    if not model.config.attention.uses_importance:
        return model
    if arm.start == "fit":
        scale = 1e-6 if arm.trained == "all but importance" else FIT_SCALE  # with so small an A there is no bias
        return train.fit_importance(model, source, batches=FIT_ROWS, chunk=128, scale=scale)[0]
    config = model.config
    drawn = Importance(config.num_layers, config.num_kv_heads, config.head_dim, rngs=nnx.Rngs(seed))
    model.layers.attention.importance = nnx.data(drawn)
    return model


def training(
    arm: Arm, size: Size, model: NosaLM, seed: int, *, steps: int, trained: Trained = "everything"
) -> TrainConfig:
    """A run of an arm; `seed` draws the order of the data, the same for all arms."""
    rates: tuple[tuple[str, float], ...] = ()
    if model.config.attention.uses_importance and trained != "all but importance":
        factor = size.importance_factor * arm.importance_rate
        rates = FIT_RATES if arm.start == "fit" else (("*importance*", factor),)
    peak = size.learning_rate * arm.rate
    optimizer = OptimizerConfig(
        learning_rate=peak, final_learning_rate=peak / 10, schedule="cosine", weight_decay=0.0,
        learning_rate_multipliers=rates,
    )  # fmt: skip
    return TrainConfig(
        model.config, optimizer, steps=steps, batch_size=size.batch_size, length=size.length, seed=seed,
        trainable=TRAINED[trained], log_every=10, eval_every=0, eval_batches=1, eval_selection=False,
        checkpoint_every=0,
    )  # fmt: skip


def completed(run: TrainConfig, source: Source, **options: Any) -> TrainResult:
    """`train.train`, where that came to its end: what half a training gives must not be gone on from, nor count. Raises
    KeyboardInterrupt where it was ended."""
    result = train.train(run, source, progress=sys.stderr.isatty(), **options)
    if result.interrupted:
        raise KeyboardInterrupt
    return result


def with_bias(model: NosaLM, factor: float) -> NosaLM:
    """The model with a bias `factor` (above 0) times as large: A is scaled, which changes the order of no tokens.

    A layer selects from the same input what it did; its input changes with the bias of those before.
    """
    old = model.layers.attention.importance
    assert old is not None
    return with_importance(model, factor * old.A[...], old.delta[...])
