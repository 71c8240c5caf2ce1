# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---


# %% [markdown]
# # Four variants, trained alike: how well do they read, and what do they move?
#
# `full`, `infllmv2`, `dma` and `nosa` are trained from the same weights on the same batches in the same order, then
# compared by the loss on texts that were held out, by where in the text it arises, by tasks, and by the bytes that
# would cross from host to device memory per token. It is the paper's comparison in small: what is seen here says how
# to make it, and nothing about large models.

# %%
import json
import os
from pathlib import Path

import common
import jax
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import nosa_jax
from nosa_jax import evals, hf, locality, train

# %% [markdown]
# **Parameters.** Without a model a small one of random weights is trained, on bytes of Python's standard library.
# With one, set `NOSA_NOTEBOOK_MODEL` to the Hugging Face folder of a dense model, which all four go on from (in
# float32: a model of a billion parameters takes 20 GB and more), and sizes that leave something to select, such as
# `NOSA_NOTEBOOK_ATTENTION='{"block_size": 32, "num_selected_blocks": 32, "num_local_blocks": 9, "num_query_blocks":
# 7}'`.

# %% tags=["parameters"]
MODEL = os.environ.get("NOSA_NOTEBOOK_MODEL")
ATTENTION = json.loads(os.environ.get("NOSA_NOTEBOOK_ATTENTION", "{}"))
OUTPUT = Path(os.environ.get("NOSA_NOTEBOOK_OUTPUT", "runs/notebooks")) / "train_four_variants"
VARIANTS = ("full", "infllmv2", "dma", "nosa")
STEPS, BATCH, LENGTH, RATE = (20, 1, 2048, 1e-5) if MODEL else (40, 4, 256, 3e-3)
TEXTS, READ = 4, 4096 if MODEL else 512  # texts to judge by, and tokens of each: longer than what was trained on
PROMPT, NEW = (2048, 256) if MODEL else (384, 128)  # of the decoding whose selections are measured
OUTPUT.mkdir(parents=True, exist_ok=True)

# %%
if MODEL:
    start, tokenizer = common.load_model(MODEL, ATTENTION, variant="full")
else:
    start = nosa_jax.NosaLM(common.small(variant="full", **ATTENTION), rngs=nnx.Rngs(0))
    tokenizer = hf.ByteTokenizer()
source = common.training_text(tokenizer, start.config, LENGTH)
texts = common.heldout_texts(tokenizer, TEXTS, READ)
nosa_jax.num_parameters(start)

# %% [markdown]
# ## Training
#
# `with_attention` gives the same weights another attention; `nosa` and `dma` get an importance of zeros. The seed of
# the configuration draws the order of the batches, the same for all four. `train.train` does the rest; give it a
# folder and it writes a log, checkpoints and a picture there.

# %%
models, curves = {}, {}
for variant in VARIANTS:
    config = train.TrainConfig(
        start.config.with_attention(variant=variant),
        train.OptimizerConfig(RATE),
        steps=STEPS,
        batch_size=BATCH,
        length=LENGTH,
        log_every=5,
        remat=MODEL is not None,
    )
    result = train.train(config, source, model=nosa_jax.with_attention(start, variant=variant), progress=False)
    models[variant] = result.model
    curves[variant] = {record["step"]: record["loss"] for record in result.history}

# %% [markdown]
# The curves jump together, for the batches are the same: compare them with each other, not one step with the next.
# Where rows are short beside what is always read, the four have little to differ by.

# %%
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for variant, losses in curves.items():
    axes.plot(list(losses), list(losses.values()), label=variant)
axes.set(xlabel="step", ylabel="training loss, nats per token")
axes.legend()
figure.savefig(OUTPUT / "training.png", dpi=150)

# %%
if not MODEL:  # from here on compiling takes longer than running
    jax.config.update("jax_disable_most_optimizations", True)

# %% [markdown]
# ## Held-out loss, and where it arises
#
# `perplexity_by_position` reads whole texts and tells how well tokens are predicted by how many came before. As long
# as no more blocks are written than a query may select, all four read everything: what differs there is due to
# weights alone. Right of the dashed line are positions that no model was trained on here. With few texts the curves
# show mostly the texts; compare them with each other.

# %%
places = {name: evals.perplexity_by_position(model, texts, parts=8, batch_size=TEXTS) for name, model in models.items()}
heldout = {name: float(np.average(place.nats, weights=place.counts)) for name, place in places.items()}
for name, nats in heldout.items():
    print(f"{name:>9}: {nats:.4f} nats per token")

# %%
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for name, place in places.items():
    axes.plot(place.starts + READ / 16, place.perplexity, marker="o", label=name)
axes.axvline(LENGTH, color="0.6", linestyle="--", label="length of training")
axes.set(xlabel="position in the text (tokens)", ylabel="perplexity")
axes.legend()
figure.savefig(OUTPUT / "perplexity.png", dpi=150)

# %% [markdown]
# ## Tasks
#
# A needle in a haystack, and several keys with their values (`evals.TASKS` has more). A small model cannot answer: it
# is only asked how likely it finds the right answer, `per token` in nats, which moves long before answers are right.
# A real one also answers, and `score` is what to look at, with its standard error.

# %%
tasks = {"tasks": ("niah_single", "mqar"), "lengths": (1024, 2048) if MODEL else (512,), "count": 20 if MODEL else 4}
tables = {
    name: evals.evaluate(model, tokenizer, **tasks, generation=MODEL is not None, label=name, progress=False)
    for name, model in models.items()
}
for name, table in tables.items():
    print(name, table, sep="\n", end="\n\n")

# %%
figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
for number, (name, table) in enumerate(tables.items()):
    likely = [row["log_likelihood_per_token"] for row in table.rows]
    axes.bar(np.arange(len(likely)) + 0.2 * (number - 1.5), likely, width=0.18, label=name)
axes.set_xticks(range(len(table.rows)), [f"{row['task']}, {row['length']}" for row in table.rows])
axes.set(ylabel="log-likelihood of the answers,\nnats per token")
axes.legend()
figure.savefig(OUTPUT / "tasks.png", dpi=150)

# %%
if MODEL:
    evals.plot_scores(tables, OUTPUT / "scores.png")

# %% [markdown]
# ## What would cross
#
# Each sparse variant, with the weights that were trained with it, decodes the same texts; see `locality_of_variants`
# for what the lines mean.

# %%
J = start.config.attention.num_selected_blocks
SLOTS = (J, J + J // 4, 2 * J)
pooled = {}
for name in VARIANTS[1:]:
    recorded = [locality.record(models[name], text[:PROMPT], NEW, text[PROMPT : PROMPT + NEW]) for text in texts[:2]]
    pooled[name] = locality.pool([one.report(SLOTS, belady=False) for one in recorded])
print(locality.comparison_table(pooled))

# %% [markdown]
# ## Quality against bytes
#
# Left and low is good. Mind the scale: the loss does not begin at 0. A line is one variant with pools of J, 5/4 J and
# 2 J slots: the loss is the same, since the pool changes no result, and the bytes fall as it grows. The point of
# `full` is what it would move with its cache in host memory: everything, every step.

# %%
block = locality.block_bytes(start.config.attention, start.config.head_dim, start.embed.dtype.itemsize)
blocks_read = np.mean(np.arange(PROMPT, PROMPT + NEW) // start.config.attention.block_size + 1)
moved = {"full": [blocks_read * block * start.config.num_layers * start.config.num_kv_heads]}
for name, several in pooled.items():
    moved[name] = [several.mean.bytes_per_token(slots) for slots in SLOTS]

figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
for name, sizes in moved.items():
    axes.plot(np.array(sizes) / 2**10, [heldout[name]] * len(sizes), marker="o", label=name)
axes.set_xscale("symlog", linthresh=1)
axes.set(xlabel="KiB from host to device per token", ylabel="held-out loss, nats per token", xlim=(-0.3, None))
axes.legend()
figure.savefig(OUTPUT / "quality_and_bytes.png", dpi=150)

# %%
print(f"{'':>9}  loss    " + "".join(f"{f'KiB, {slots} slots':>15}" for slots in SLOTS))
for name in VARIANTS:
    cells = [f"{size / 2**10:>15.1f}" for size in moved[name]]
    print(f"{name:>9}  {heldout[name]:.4f}  " + "".join(cells) + ("  (all of its cache)" if name == "full" else ""))
content = {"loss": heldout, "bytes_per_token": moved, "slots": SLOTS, "curves": curves}
(OUTPUT / "results.json").write_text(json.dumps(content, indent=1) + "\n")

# %% [markdown]
# One run of each says little where losses are close: repeat with `TrainConfig(seed=...)` before believing an order,
# and train until importance had time to learn. `train.presets` has the stages of the paper.
