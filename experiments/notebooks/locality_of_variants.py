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
# # How local are the selections of three kinds of sparse attention?
#
# `nosa`, `infllmv2` and `dma` select as many blocks of the cache for each query, but not the same ones. The fewer
# blocks change from one token to the next, the fewer have to cross from host to device memory when the cache lives in
# host memory. Here all three read the same texts, token by token, and what they select is recorded and measured.
#
# All three have **the same weights**, those of one model. So this compares rules of selection, not models that were
# trained with them: the notebook `train_four_variants` does that.

# %%
import json
import os
from pathlib import Path

import common
import jax
import matplotlib.pyplot as plt
import numpy as np

import nosa_jax
from nosa_jax import CacheConfig, locality, train

# %% [markdown]
# **Parameters.** Without a model a small one is trained here, for some seconds, on bytes of Python's standard
# library. With one, set `NOSA_NOTEBOOK_MODEL` to its Hugging Face folder. Give a dense model sizes that leave
# something to select in texts of this length, such as `NOSA_NOTEBOOK_ATTENTION='{"block_size": 32,
# "num_selected_blocks": 32, "num_local_blocks": 9, "num_query_blocks": 7}'`.

# %% tags=["parameters"]
MODEL = os.environ.get("NOSA_NOTEBOOK_MODEL")
ATTENTION = json.loads(os.environ.get("NOSA_NOTEBOOK_ATTENTION", "{}"))
OUTPUT = Path(os.environ.get("NOSA_NOTEBOOK_OUTPUT", "runs/notebooks")) / "locality_of_variants"
TEXTS = 3  # texts that are read, each of which counts once
PROMPT, NEW = (2048, 512) if MODEL else (384, 192)  # tokens read before recording starts, and recorded
VARIANTS = ("nosa", "infllmv2", "dma")
OUTPUT.mkdir(parents=True, exist_ok=True)

# %%
model, tokenizer = common.load_model(MODEL, ATTENTION)
texts = common.heldout_texts(tokenizer, TEXTS, PROMPT + NEW)
if not MODEL:  # from here on compiling takes longer than running
    jax.config.update("jax_disable_most_optimizations", True)
model.config.attention

# %% [markdown]
# A dense model has no importance. Then it gets one that is fitted to what far queries of the dense model attend to,
# for otherwise `nosa` would select as `infllmv2` does, and `dma` at random. See `what_importance_learns`.

# %%
if not model.config.attention.uses_importance:
    source = common.training_text(tokenizer, model.config, length=PROMPT)
    model, fit = train.fit_importance(model, source)
    print("share of the variance that is explained, by layer and head:", fit.r2.round(2), sep="\n")

# %% [markdown]
# ## Recording
#
# `locality.record` reads a prompt, then decodes with the cache in host memory. The tokens that it feeds are those of
# the text, whatever the model finds likely, so that all variants read the same words.

# %%
selections = {}
for variant in VARIANTS:
    rival = nosa_jax.with_attention(model, variant=variant)
    selections[variant] = [locality.record(rival, text[:PROMPT], NEW, text[PROMPT:]) for text in texts]
selections["nosa"][0]

# %% [markdown]
# ## One table
#
# `report` measures one recording, and `pool` puts those of several texts together: means, ± the standard deviation
# over texts. With few texts the spread says how careful one has to be, not more.
#
# - **gamma** is the share of blocks that are kept from one step to the next. Sink and local blocks are always
#   selected and make much of it, so look at **gamma, unforced blocks**, which leaves them out.
# - **misses** are blocks fetched per step, layer and KV head when so many blocks have room on the device and the
#   least recently used one leaves: the rule of the decode engine. **The offline optimum** (Belady) knows the future;
#   what lies between the two is all that a better rule of eviction could ever win.
# - **working set**: different blocks in use over so many steps.

# %%
J = model.config.attention.num_selected_blocks
SLOTS = (J, J + J // 4, J + J // 2, 2 * J, 3 * J)
reports = {name: [recorded.report(SLOTS) for recorded in several] for name, several in selections.items()}
pooled = {name: locality.pool(several) for name, several in reports.items()}
print(locality.comparison_table(pooled))

# %% [markdown]
# Every measure also exists by layer and KV head: `report.to_dataframe()` makes a data frame of it, and a report as
# the last line of a cell shows all. Heads differ more than methods do at times.

# %%
reports["nosa"][0]

# %%
means = {name: several.mean for name, several in pooled.items()}
locality.plot_comparison(means, OUTPUT / "comparison.png")

# %% [markdown]
# The shades above are the range over KV heads. Below the bars are one standard deviation over texts. At `slots = J`
# nothing can be kept but what is selected again, so that both rules of eviction are one.

# %%
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for number, (name, several) in enumerate(reports.items()):
    misses = np.array([[report.misses[slots].mean() for slots in SLOTS] for report in several])
    optimum = np.array([[report.optimal_misses[slots].mean() for slots in SLOTS] for report in several])
    axes.errorbar(SLOTS, misses.mean(0), misses.std(0, ddof=1), marker="o", capsize=3, color=f"C{number}", label=name)
    axes.plot(SLOTS, optimum.mean(0), ":", color=f"C{number}", label=f"{name}, offline optimum")
axes.set(xlabel="slots (blocks on the device)", ylabel="misses per step, layer and KV head", ylim=(0, None))
axes.legend()
figure.savefig(OUTPUT / "misses.png", dpi=150)

# %% [markdown]
# ## How far back
#
# **Reuse distance** is how many other blocks were used since a block was used last. A pool of so many slots has lost
# every block whose distance is as large as that: one curve tells the misses of all pools. Look at how steeply it
# falls just right of J, which is what a few more slots win.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
for name, several in selections.items():
    distances = np.concatenate([locality.reuse_distance(recorded.block_ids).ravel() for recorded in several])
    used_before = distances[distances >= 0]
    sizes = np.arange(used_before.max() + 2)
    lost = [(used_before >= size).mean() for size in sizes]
    left.plot(sizes, lost, label=name)
left.axvline(J, color="0.6", linestyle="--", label="J")
left.set(yscale="log", xlabel="reuse distance (blocks)", ylabel="share of uses from at least so far")
left.legend()

for name, several in selections.items():
    chosen_far = []
    for recorded in several:
        positions = recorded.positions[:, None]
        away = locality.attended_distance(recorded.block_ids, positions, recorded.attention)
        chosen = ~locality.is_forced(recorded.block_ids, positions, recorded.attention)
        chosen_far.append(np.asarray(away)[np.asarray(chosen) & (recorded.block_ids >= 0)])
    far = np.concatenate(chosen_far)
    right.hist(far, bins=np.arange(far.max() + 2) - 0.5, density=True, histtype="step", label=name)
right.set(xlabel="blocks from the query back to a block that was chosen", ylabel="share of chosen blocks")
right.legend()
figure.savefig(OUTPUT / "distances.png", dpi=150)

# %% [markdown]
# On the right, blocks that are chosen, not forced. The local window is left of where the curves begin. An upward end
# of the curve far right would be blocks near the beginning of the text.
#
# ## Bytes, and what they would cost
#
# `pool_costs` puts the misses that were measured into `nosa_jax.plan`: what crosses per token, and how long a step
# takes if it takes its time for device memory plus its time for the link, a bound and not a promise. The rates are
# those of the card at hand where it is known, else of an H200. For a small model they say little; pass the
# configuration of a large one with the same attention to see what it would take *if it selected like this*.

# %%
BATCH, LENGTH = 16, PROMPT + NEW
configs = {name: model.config.with_attention(variant=name) for name in VARIANTS}
costs = {name: locality.pool_costs(means[name], configs[name], batch=BATCH, max_length=LENGTH) for name in VARIANTS}
print(f"{BATCH} rows of {LENGTH} tokens:")
print(locality.cost_table(costs))

# %%
best = locality.pool_costs(means["nosa"], configs["nosa"], batch=BATCH, max_length=LENGTH, policy="belady")
print(locality.cost_table({"nosa, offline optimum": best}))

# %% [markdown]
# `full` selects nothing, so that there is nothing to measure: it reads its whole cache every step, from the device.

# %%
full = model.config.with_attention(variant="full")
print(nosa_jax.plan(full, BATCH, LENGTH, CacheConfig(offload=False)))

# %% [markdown]
# ## Seeing it
#
# A map of one KV head: orange is a block that is new at a step. Many orange dots in a row are a block that comes and
# goes, which is what a few spare slots catch.

# %%
middle = model.config.num_layers // 2
nosa, infllmv2, dma = (selections[name][0] for name in VARIANTS)
locality.plot_selection_map(nosa, layer=middle, path=OUTPUT / "map-nosa.png")

# %%
locality.plot_selection_map(infllmv2, layer=middle, path=OUTPUT / "map-infllmv2.png")

# %%
locality.plot_selection_map(dma, layer=middle, path=OUTPUT / "map-dma.png")

# %% [markdown]
# All KV heads of a layer at once. Horizontal lines are blocks that all queries want.

# %%
locality.plot_heatmaps(nosa, path=OUTPUT / "heatmaps-nosa.png")

# %% [markdown]
# Where two methods disagree over the same text: red is what `infllmv2` selects more often, blue what `nosa` does.

# %%
locality.plot_difference(nosa, infllmv2, path=OUTPUT / "difference.png")

# %% [markdown]
# ## Keeping it
#
# Selections can be measured again without the model, with other sizes, say; `Selections.load` reads the file.

# %%
for name, several in selections.items():
    for number, recorded in enumerate(several):
        recorded.save(OUTPUT / f"{name}-{number}.npz")
summary = {name: several.to_dict() for name, several in pooled.items()}
(OUTPUT / "reports.json").write_text(json.dumps(summary, indent=1) + "\n")
sorted(file.name for file in OUTPUT.iterdir())
