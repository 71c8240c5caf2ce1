"""What the study compares: budgets, what trains, starts, and the model with another bias."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from support import lively_model, random_tokens, small_config

import nosa_jax
from experiments.study import arms
from experiments.study.arms import ARMS, SIZES, TRAINED, Arm
from nosa_jax import AttentionConfig, NosaLM, presets, train
from nosa_jax._pytree import by_name
from nosa_jax.train.patterns import split

DENSE = small_config().with_attention(variant="full")
SIZE = SIZES["cpu"]
STAGED = ("query share annealed", "importance first")


@pytest.mark.parametrize("size", SIZES.values())
def test_budgets_are_the_shares_that_they_are_called(size):
    shares = {"quarter": 4, "eighth": 8, "half": 2}
    assert len({arm.name for arm in ARMS}) == len(ARMS)
    for arm in ARMS:
        attention = AttentionConfig(**arm.attention(size))  # which refuses what does not go together
        tokens = attention.num_selected_blocks * attention.block_size
        assert tokens * shares[arm.budget] == size.length, arm
        assert attention.num_local_blocks * attention.block_size <= tokens / 2, arm
        if arm.query_share is not None:
            assert attention.num_query_blocks == arm.query_share * attention.num_selected_blocks, arm
        usual = dataclasses.replace(arm, halves=False).attention(size)
        for name, value in usual.items():
            if arm.halves and name.startswith("num_"):
                assert getattr(attention, name) == 2 * value, arm
    # Losses are of sixteen parts, and reports of windows of 64 steps.
    assert size.length % 16 == 0 and 64 < size.decode_steps < size.length


def test_what_trains_is_what_it_is_called():
    """For models of the kinds that are continued: tied embeddings, no biases, no norms of heads."""
    model = jax.eval_shape(lambda: NosaLM(presets.tiny(variant="nosa"), rngs=nnx.Rngs(0)))
    importance = {"layers.attention.importance.A", "layers.attention.importance.delta"}
    expected = {"everything": set(by_name(model)), "importance": importance}
    expected["all but importance"] = expected["everything"] - importance
    found = {trained: set(by_name(split(model, patterns)[0])) for trained, patterns in TRAINED.items()}
    assert found == expected
    # No pattern says what another one says, too.
    for pattern in TRAINED["all but importance"]:
        others = tuple(other for other in TRAINED["all but importance"] if other != pattern)
        assert set(by_name(split(model, others)[0])) < expected["all but importance"], pattern


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_arm_can_be_trained(arm):
    """Patterns of rates, too, must match what trains."""
    config = DENSE.with_attention(**arm.attention(SIZE))
    model = jax.eval_shape(lambda: NosaLM(config, rngs=nnx.Rngs(0)))
    run = arms.training(arm, SIZE, model, 7, steps=30, trained=arm.trained)
    assert run.seed == 7 and run.model == config and run.steps == 30
    assert run.optimizer.learning_rate == SIZE.learning_rate * arm.rate
    trainable = split(model, run.trainable)[0]
    jax.eval_shape(train.as_optimizer(run.optimizer, run.steps).init, trainable)
    rates = dict(run.optimizer.learning_rate_multipliers)
    learns = arm.variant in ("nosa", "dma") and arm.trained != "all but importance"
    expected = [] if not learns else [5.0, 2.0] if arm.start == "fit" else [10.0 * arm.importance_rate]
    assert sorted(rates.values(), reverse=True) == expected


@pytest.mark.parametrize("size", SIZES.values())
def test_stages_are_of_the_arm_but_for_what_they_say(size):
    annealed, first = (next(arm for arm in ARMS if arm.name == f"nosa, {name}") for name in STAGED)
    attention = [AttentionConfig(**annealed.attention_of(stage, size)) for stage in annealed.stages]
    budget = size.budgets["quarter"]
    assert [one.num_selected_blocks for one in attention] == [budget.selected] * 2
    left = budget.selected - budget.sink - budget.local
    assert left == attention[0].num_query_blocks >= attention[1].num_query_blocks > budget.query
    (stage,) = first.stages
    whole = first.attention_of(stage, size)
    assert whole["num_selected_blocks"] * size.block_size == size.length and stage.trained == "importance"
    assert whole | {"num_selected_blocks": budget.selected} == first.attention(size)


def test_starts_are_of_the_seed_or_fitted(monkeypatch):
    fits = []
    monkeypatch.setattr(arms.train, "fit_importance", lambda model, source, **kw: fits.append(kw) or (model, None))
    dense = NosaLM(DENSE, rngs=nnx.Rngs(0))
    begin = lambda seed, **fields: arms.started(dense, Arm("an arm", **fields), SIZE, None, seed)
    one, same, other = (begin(seed, variant="dma").layers.attention.importance for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.delta[...], same.delta[...])
    assert (one.delta[...] != other.delta[...]).any() and not one.A[...].any()
    assert begin(0, variant="infllmv2").layers.attention.importance is None and fits == []
    begin(0, variant="nosa", start="fit")
    begin(0, variant="nosa", start="fit", trained="all but importance")
    assert [fit["scale"] for fit in fits] == [arms.FIT_SCALE, 1e-6]
    model = begin(0, variant="nosa", budget="half")
    assert model.config.attention == AttentionConfig(**Arm("an arm", "nosa", budget="half").attention(SIZE))
    assert model.embed[...] is dense.embed[...] and dense.config == DENSE


def test_another_bias_leaves_the_order_of_tokens():
    """One layer, whose input no bias changes: the same selections, and logits that know of the bias."""
    model, tokens = lively_model(small_config(layers=1)), random_tokens(1, 200)
    old = model.layers.attention.importance
    before = nosa_jax.forward(model, tokens, record=True)
    for factor in (1e-6, 32**-0.5, 1.0):
        changed = arms.with_bias(model, factor)
        new = changed.layers.attention.importance
        np.testing.assert_array_equal(new.delta[...], old.delta[...])
        np.testing.assert_allclose(new.A[...], factor * old.A[...], rtol=1e-6)
        after = nosa_jax.forward(changed, tokens, record=True)
        np.testing.assert_array_equal(after.block_ids, before.block_ids)
        assert (abs(after.logits - before.logits).max() > 0.01) == (factor != 1)
    assert model.layers.attention.importance is old and changed.config == model.config
