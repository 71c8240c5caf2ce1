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
# # Decoding with the cache in host memory, step by step
#
# A prompt is read, then tokens are fed one by one, and after every step one looks into the state: which blocks the
# step wanted, which of them were on the device already, and what crossed from the host. Then the same for whole
# generations and several sizes of the pool: what was fetched is what `locality.replay_misses` predicts from the
# selections alone, and the logits are, to the bit, those of a cache that is all on the device.

# %%
import json
import os
from pathlib import Path

import common
import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

import nosa_jax
from nosa_jax import CacheConfig, Selections, locality, presets

# %% [markdown]
# **Parameters.** Without a model a small one is trained here, for some seconds, on bytes of Python's standard
# library. With one, set `NOSA_NOTEBOOK_MODEL` to its Hugging Face folder; a dense one attends as `nosa` here, with
# importance 0, which changes nothing about what is shown. `SLOTS` of None is J + J/4, the default.

# %% tags=["parameters"]
MODEL = os.environ.get("NOSA_NOTEBOOK_MODEL")
ATTENTION = json.loads(os.environ.get("NOSA_NOTEBOOK_ATTENTION", "{}"))
OUTPUT = Path(os.environ.get("NOSA_NOTEBOOK_OUTPUT", "runs/notebooks")) / "offloaded_decode"
PROMPT, NEW = (2048, 128) if MODEL else (384, 96)  # tokens read at once, and tokens decoded
SLOTS = None  # blocks per row, layer and KV head that stay on the device
LAYER, HEAD = 1, 0  # that are looked at
OUTPUT.mkdir(parents=True, exist_ok=True)

# %%
model, tokenizer = common.load_model(MODEL, ATTENTION)
if not model.config.attention.is_sparse:
    model = nosa_jax.with_attention(model, variant="nosa")
text = common.heldout_texts(tokenizer, 1, PROMPT + NEW)
prompt, following = text[:, :PROMPT], text[:, PROMPT:]
if not MODEL:  # from here on compiling takes longer than running
    jax.config.update("jax_disable_most_optimizations", True)
attention, J = model.config.attention, model.config.attention.num_selected_blocks
attention

# %% [markdown]
# ## Before anything is allocated
#
# `plan` counts bytes: what lies in host memory, what on the device, and what crosses per token. Its fetched blocks
# are those that were published for large models, not those of this one; they are measured below.

# %%
cache = CacheConfig(slots=SLOTS)
print(nosa_jax.plan(model.config, 1, PROMPT + NEW, cache, dtype=model.embed.dtype))

# %% [markdown]
# ## Prefill, and what the state holds
#
# `prefill` reads the prompt and gives a state, one pytree. The pool `[L, B, K, slots, 2, P, D]` is on the device:
# keys and values of the blocks that have a slot. The store `[L, pages, K, 2, P, D]` is in host memory and holds every
# full block. The table says which block lies in which slot, and at which position it was last used.

# %%
state, logits = nosa_jax.prefill(model, prompt, max_length=PROMPT + NEW, cache=cache)
for name, array in (("pool", state.pool), ("host", state.host), ("table.blocks", state.table.blocks)):
    print(f"{name:>14} {array.dtype}{list(array.shape)} in {array.sharding.memory_kind}")
print("tokens in the cache:", state.lengths, "of", state.limits, "- blocks of this head on the device:")
print(np.sort(np.asarray(state.table.blocks[LAYER, 0, HEAD])), "(-1: an empty slot)")

# %% [markdown]
# After the prefill the slots hold what the last token of the prompt selected.
#
# ## One step after the other
#
# `jit_decode_step` feeds one token. A block was wanted by a step if it was used at the step's position; it crossed if
# it was not in a slot before, except for the block that the new token starts, which has nothing to fetch yet.

# %%
steps = []
for token in following[0, :-1]:
    position, before = int(state.lengths[0]), set(np.asarray(state.table.blocks[LAYER, 0, HEAD]).tolist())
    state, logits = nosa_jax.jit_decode_step(model, state, np.array([token]))  # the old state is gone
    blocks, used = (np.asarray(x[LAYER, 0, HEAD]) for x in state.table)
    wanted = set(blocks[used == position].tolist())
    started = {position // attention.block_size} if position % attention.block_size == 0 else set()
    resident, crossed = set(blocks.tolist()) - {-1}, wanted - before - started
    steps.append((position, wanted & before, resident, wanted, crossed))

# %%
for position, there, _, wanted, crossed in steps[:12]:
    print(f"token {position}: wants {sorted(wanted)}, {len(there)} are there, {sorted(crossed) or 'nothing'} crosses")

# %% [markdown]
# The same as a picture. Pale blocks are on the device without being wanted: those are what slots beyond J are for.
# Look at what happens left of an orange dot: was the block pale just before it left, or long gone?

# %%
kinds = np.zeros((steps[-1][0] // attention.block_size + 1, len(steps)), int)
for column, step in enumerate(steps):
    for number, members in enumerate(step[2:], start=1):  # later ones have the last word
        kinds[sorted(members), column] = number
figure, axes = plt.subplots(figsize=(11, 4.5), layout="constrained")
colours = ListedColormap(["#F1F1EE", "#9CC9E3", "#0072B2", "#D55E00"])
first = steps[0][0]
extent = (first - 0.5, first + len(steps) - 0.5, -0.5, len(kinds) - 0.5)
image = axes.imshow(kinds, cmap=colours, vmin=-0.5, vmax=3.5, aspect="auto", origin="lower", extent=extent)
bar = figure.colorbar(image, ticks=range(4))
bar.set_ticklabels(["not on the device", "there, not wanted", "wanted and there", "crossed"])
axes.set(title=f"layer {LAYER}, KV head {HEAD}", xlabel="position of the token", ylabel="block")
figure.savefig(OUTPUT / "steps.png", dpi=150)

# %% [markdown]
# ## Whole generations: the same bits, and the predicted fetches
#
# `generate` is that loop in one program, and records on request: logits, the blocks that were selected, and how many
# were fetched. The first entry is the prefill's. `replay_misses` runs the rule of the slots over the selections,
# without a model. Both columns must say `True`, for every size of the pool.

# %%
options = {"max_new_tokens": NEW, "forced_tokens": following, "record": True}
on_device = nosa_jax.generate(model, prompt, cache=CacheConfig(offload=False), **options)
sizes = (J, J + J // 4, 2 * J)
block = locality.block_bytes(attention, model.config.head_dim, model.embed.dtype.itemsize)
fetched = {}
print("slots  fetched per step, layer, KV head  KiB per token  as replayed  same bits")
for slots in sizes:
    out = nosa_jax.generate(model, prompt, cache=CacheConfig(slots=slots), **options)
    recorded = Selections.from_generation(out, [PROMPT], config=model.config, itemsize=model.embed.dtype.itemsize)
    replayed = locality.replay_misses(recorded.block_ids, recorded.positions[:, None], attention, slots)
    fetched[slots] = np.asarray(out.fetched)[:, 0]  # [L, K, new]
    as_replayed = bool((out.fetched == replayed).all())
    same_bits = np.asarray(out.logits).tobytes() == np.asarray(on_device.logits).tobytes()
    mean, size = fetched[slots][..., 1:].mean(), fetched[slots][..., 1:].sum((0, 1)).mean() * block / 2**10
    print(f"{slots:>5}  {mean:>33.3f}  {size:>13.1f}  {as_replayed!s:>11}  {same_bits!s:>9}")
    assert as_replayed and same_bits

# %% [markdown]
# So the selections of one run tell what any pool would have fetched. `locality.record` is the short way to them, and
# its report replays pools of any size, also by the best rule of eviction that there can be.

# %%
selections = locality.record(model, prompt[0], NEW, following[0])
assert (selections.block_ids == recorded.block_ids).all()
selections.report(sizes)

# %% [markdown]
# ## When it crosses
#
# Blocks fetched so far, by all layers and KV heads together. Where a line is steep many blocks were new at once; look
# at whether all pools are steep at the same tokens. What remains with the largest pool is what came back after long,
# or for the first time.

# %%
figure, axes = plt.subplots(figsize=(11, 3.5), layout="constrained")
for slots, counts in fetched.items():
    axes.plot(PROMPT - 1 + np.arange(NEW), counts.sum((0, 1)).cumsum(), label=f"{slots} slots")
axes.set(xlabel="position of the token", ylabel="blocks fetched so far", ylim=(0, None))
axes.legend()
figure.savefig(OUTPUT / "fetched.png", dpi=150)

# %% [markdown]
# ## With the measured fetches, and for a large model
#
# `misses=` puts what was measured into the plan. The second plan is of the released 8B shape with published fetches:
# 16 rows of 16K tokens. Compare its host memory with what a device has.

# %%
slots = cache.resolve_slots(attention, len(kinds))
measured = float(np.asarray(selections.report((slots,)).misses[slots]).mean())
print(nosa_jax.plan(model.config, 1, PROMPT + NEW, cache, dtype=model.embed.dtype, misses=measured))

# %%
print(nosa_jax.plan(presets.nosa_8b(), batch=16, max_length=16384, cache=CacheConfig(slots=80)))
