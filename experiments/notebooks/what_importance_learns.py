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
# # What does importance learn?
#
# Most of the blocks that `nosa` selects, and all that `dma` chooses, are those whose tokens have a large
# *importance*: `b = A softplus(v delta)`, a number for each token, layer and KV head that depends on the token's
# value `v` and on no query. It is also added to the logits of attention, so that a gradient reaches `A` and `delta`.
# Here one sees it before and after training, and beside a start that is fitted, not trained: `train.fit_importance`.

# %%
import json
import os
from pathlib import Path

import common
import jax
import matplotlib.pyplot as plt
import numpy as np

import nosa_jax
from nosa_jax import locality, train

# %% [markdown]
# **Parameters.** Without a model a small dense one is trained here, on bytes of Python's standard library. With one,
# set `NOSA_NOTEBOOK_MODEL` to its Hugging Face folder, dense or not. Texts must be long enough to have tokens beyond
# the local window; for a dense model set sizes that leave something to select, such as
# `NOSA_NOTEBOOK_ATTENTION='{"block_size": 32, "num_selected_blocks": 32, "num_local_blocks": 9, "num_query_blocks":
# 7}'`.

# %% tags=["parameters"]
MODEL = os.environ.get("NOSA_NOTEBOOK_MODEL")
ATTENTION = json.loads(os.environ.get("NOSA_NOTEBOOK_ATTENTION", "{}"))
OUTPUT = Path(os.environ.get("NOSA_NOTEBOOK_OUTPUT", "runs/notebooks")) / "what_importance_learns"
LENGTH = 2048 if MODEL else 384  # tokens of a row, for fitting and training
PROMPT, NEW = (2048, 256) if MODEL else (512, 128)  # of the text that is looked at
STEPS, BATCH, RATE = (20, 1, 1e-2) if MODEL else (40, 4, 3e-2)  # of training importance alone
OUTPUT.mkdir(parents=True, exist_ok=True)

# %%
loaded, tokenizer = common.load_model(MODEL, ATTENTION, variant=None if MODEL else "full")
dense = nosa_jax.with_attention(loaded, variant="full")
source = common.training_text(tokenizer, dense.config, LENGTH)
texts = common.heldout_texts(tokenizer, 3, PROMPT + NEW)

# %% [markdown]
# ## Before training
#
# `with_attention` gives a dense model the attention of NOSA. Its importance is new: `A` is 0, so that no token has
# any, attention is not biased, and which blocks importance selects means nothing yet.

# %%
models = {"untrained": nosa_jax.with_attention(dense, variant="nosa")}
if loaded.config.attention.uses_importance:
    models["as loaded"] = loaded
importance = locality.token_importance(models["untrained"], texts[:1])
importance.shape, np.abs(importance).max()

# %% [markdown]
# ## A start that is fitted
#
# In the dense model one can count how much attention a token gets from queries beyond the local window. Regression of
# the logarithm of that on values gives a `delta` by which tokens are ordered as far queries order them on average.
# `A` is small, so that attention itself hardly changes. This start is an idea of this project, not of the paper.
#
# `r2`, by layer and KV head, is the share of the variance that the fit explains in text that it has not seen. It is
# low where what far queries want depends on the query: importance cannot know that, and training will not change it.

# %%
models["fitted"], fit = train.fit_importance(models["untrained"], source, batches=8, batch_size=BATCH)
print(f"{fit.tokens} tokens fitted, {fit.checked_tokens} checked; r2 by layer and KV head:")
print(fit.r2.round(3))

# %% [markdown]
# ## Training importance alone
#
# `trainable="importance"` leaves all other weights as they are: what changes below is due to importance. Once from
# zero, as the paper has it, and once from the fit. (Few steps and one rate, chosen to show something in seconds.)
#
# Mind that Adam's first steps move every number by about the rate: where that is more than the fitted `A`, its sign may
# turn over, and the order of tokens with it. A correlation near -1 further below shows that; a larger `scale` of the
# fit or a smaller rate makes it less likely.

# %%
config = train.TrainConfig(
    models["untrained"].config,
    train.OptimizerConfig(RATE, weight_decay=0.0),
    steps=STEPS,
    batch_size=BATCH,
    length=LENGTH,
    trainable="importance",
    remat=MODEL is not None,
)
for name, start in (("trained from zero", "untrained"), ("trained from the fit", "fitted")):
    result = train.train(config, source, model=models[start], progress=False)
    models[name] = result.model
    first, *_, last = (record["loss"] for record in result.history)
    print(f"{name}: loss of the first batch {first:.3f}, of the last {last:.3f}")

# %%
if not MODEL:  # from here on compiling takes longer than running
    jax.config.update("jax_disable_most_optimizations", True)

# %% [markdown]
# Batches differ, so judge by texts that were held out. `dense` is what the same weights reach when they read
# everything. Where a sparse model comes close to it, tokens that it does not read do not matter much to this model.

# %%
for name, model in {"dense": dense, **models}.items():
    print(f"{name:>22}: {train.evaluate(model, [texts]).loss:.4f} nats per token")

# %% [markdown]
# ## Importance along a text
#
# `record(..., importance=True)` keeps what each token weighs beside the selections. One panel per layer, one line per
# KV head. Look at whether some tokens stand out, and whether heads agree; the scale is that of logits of attention,
# so that a difference of 1 is a factor of 2.7.

# %%
text = texts[0]
recorded = {
    name: locality.record(model, text[:PROMPT], NEW, text[PROMPT:], importance=True, label=name)
    for name, model in models.items()
}
weights = {name: one.importance[:, 0] for name, one in recorded.items()}  # [L, K, tokens]
locality.plot_importance(weights["trained from zero"], path=OUTPUT / "importance-trained.png")

# %%
locality.plot_importance(weights["fitted"], path=OUTPUT / "importance-fitted.png")

# %% [markdown]
# How much importance varies over the tokens of the text, by layer and KV head. A head that is dark makes no
# difference between tokens: it selects by what little there is, but its attention is not biased.

# %%
shown = [name for name in weights if name != "untrained"]
figure, grid = plt.subplots(1, len(shown), figsize=(3.2 * len(shown), 4), layout="constrained", squeeze=False)
for axes, name in zip(grid[0], shown, strict=True):
    image = axes.imshow(weights[name].std(-1), aspect="auto", vmin=0)
    axes.set(title=name, xlabel="KV head", ylabel="layer")
    axes.set_xticks(range(weights[name].shape[1]))
    axes.set_yticks(range(len(weights[name])))
    figure.colorbar(image, ax=axes, label="standard deviation over tokens")
figure.savefig(OUTPUT / "spread.png", dpi=150)

# %% [markdown]
# ## Does training find what the fit finds?
#
# The rank correlation of both over the tokens of the text: 1 orders them alike, 0 has nothing to do with it. Training
# sees the loss, the fit sees only where the dense model attends, and the two need not agree.

# %%
ranks = {name: weights[name].argsort(-1).argsort(-1) for name in shown}
for layer, head in np.ndindex(*weights["fitted"].shape[:2]):
    pairs = [np.corrcoef(ranks["fitted"][layer, head], ranks[name][layer, head])[0, 1] for name in shown]
    cells = (f"{name} {r:+.2f}" for name, r in zip(shown, pairs, strict=True))
    print(f"layer {layer}, KV head {head}: ", *cells, sep="  ")

# %% [markdown]
# ## The tokens that matter
#
# Each head is put on one scale, then the mean is taken over heads: 1 is one standard deviation above a head's own
# mean. Only tokens that come five times or more are listed. Bytes are letters here; with a real tokenizer one reads
# words.

# %%
for name in shown:
    top = locality.top_tokens(weights[name], text, tokenizer, count=8, least=5)
    print(f"{name:>22}:", "  ".join(f"{token.text} ({token.importance:+.1f})" for token in top))

# %%
locality.plot_top_tokens(weights["trained from zero"], text, tokenizer, least=5, path=OUTPUT / "top-tokens-trained.png")

# %%
locality.plot_top_tokens(weights["fitted"], text, tokenizer, least=5, path=OUTPUT / "top-tokens-fitted.png")

# %% [markdown]
# ## Other blocks are selected
#
# Red: blocks that are selected more often after training importance, blue: less often. Lines along the text are
# blocks that importance moved in or out for all queries. Whether that made selections more local is below.

# %%
locality.plot_difference(recorded["untrained"], recorded["trained from zero"], path=OUTPUT / "difference.png")

# %%
reports = {name: one.report(belady=False) for name, one in recorded.items()}
print(locality.comparison_table(reports))
