"""Which parameters train: patterns over names, models cut in two, norms by group."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from support import small_config

from nosa_jax import NosaLM
from nosa_jax._pytree import by_name
from nosa_jax.train import TrainConfig, global_norm, make_optimizer, merge, norms_by_group, split
from nosa_jax.train.metrics import GROUPS
from nosa_jax.train.optim import OptimizerConfig
from nosa_jax.train.patterns import as_rules, first_match, matches

CONFIG = dataclasses.replace(small_config(), tie_embeddings=False, qk_norm=True, qkv_bias=True)
IMPORTANCE = {"layers.attention.importance.A", "layers.attention.importance.delta"}


@pytest.fixture(scope="module")
def model():
    return NosaLM(CONFIG, rngs=nnx.Rngs(0))


def names(tree):
    return set(by_name(tree))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(x is y for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize(
    "patterns, expected",
    [
        (("*importance*",), IMPORTANCE),
        ("importance", IMPORTANCE),
        (("layers.mlp.*", "embed"), {"layers.mlp.gate_up", "layers.mlp.down", "embed"}),
        (("*.[A-Z]",), {"layers.attention.importance.A"}),
        ("norm", {"norm"}),  # a whole name
    ],
)
def test_split_cuts_by_name_and_merge_puts_together(model, patterns, expected):
    trainable, frozen = split(model, patterns)
    assert names(trainable) == expected
    assert names(frozen) == names(model) - expected
    assert same(merge(trainable, frozen), model)


@given(data=st.data())
def test_every_set_of_names_can_train(model, data):
    chosen = data.draw(st.sets(st.sampled_from(sorted(names(model))), min_size=1))
    trainable, frozen = split(model, sorted(chosen))
    assert names(trainable) == chosen and not names(trainable) & names(frozen)
    assert same(merge(trainable, frozen), model)


def test_everything_leaves_nothing_frozen(model):
    trainable, frozen = split(model, "everything")
    assert same(trainable, model) and not jax.tree.leaves(frozen)


def test_frozen_parameters_have_neither_gradients_nor_moments(model):
    trainable, frozen = split(model, "importance")
    loss = lambda part: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(merge(part, frozen)))
    grads = jax.jit(jax.grad(loss))(trainable)
    assert names(grads) == IMPORTANCE
    for name, leaf in by_name(grads).items():
        np.testing.assert_allclose(leaf, 2 * by_name(model)[name], rtol=1e-6)
    state = make_optimizer(OptimizerConfig(), 10).init(trainable)
    moments = {f"1.{moment}.{name}" for moment in ("mu", "nu") for name in IMPORTANCE}
    assert names(state) == moments | {"1.count", "3.count"}
    assert jax.tree.structure(state[1].mu) == jax.tree.structure(trainable)


def test_a_pattern_that_matches_nothing_is_refused_with_the_names_there_are(model):
    with pytest.raises(ValueError, match=r"trainable: must match names .* got 'mlp', .* There are: embed, .*mlp.down"):
        split(model, ("*importance*", "mlp"))
    dense = NosaLM(CONFIG.with_attention(variant="full"), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"TrainConfig.trainable: .* got '\*importance\*', which matches none"):
        split(dense, "importance", argument="TrainConfig.trainable")


@pytest.mark.parametrize(
    "value, error, message",
    [
        ((), ValueError, "TrainConfig.trainable: must hold patterns, none of them empty, got \\(\\)"),
        (("a", ""), ValueError, "none of them empty"),
        (("a", 3), TypeError, "TrainConfig.trainable: must be glob patterns, got \\('a', 3\\)"),
    ],
)
def test_what_is_no_pattern_is_refused(value, error, message, without_type_checker):
    with pytest.raises(error, match=message):
        TrainConfig(CONFIG, trainable=value)


def test_words_are_short_for_patterns():
    assert TrainConfig(CONFIG, trainable="importance").trainable == ("*importance*",)
    assert TrainConfig(CONFIG, trainable=("everything",)).trainable == TrainConfig(CONFIG).trainable == ("*",)


def test_the_first_rule_that_matches_counts():
    rules = as_rules("rules", {"*.A": 2, "*importance*": 3}, 0.0, 10.0)
    assert rules == (("*.A", 2.0), ("*importance*", 3.0))
    found = [first_match(rules, name, 1.0) for name in ("x.importance.A", "x.importance.delta", "x.qkv")]
    assert found == [2, 3, 1]
    assert matches(("b*", "a*"), "a.b") and not matches(("a",), "a.b")


@pytest.mark.parametrize(
    "value, error, message",
    [
        (("*", 1.0), TypeError, "rules: must be pairs of a glob pattern and a number"),
        ((("*", 1.0, 2.0),), TypeError, "rules: must be pairs"),
        ((("*", "fast"),), TypeError, r"rules\['\*'\]: must be a number, got 'fast'"),
        ((("*", 11.0),), ValueError, r"rules\['\*'\]: must lie between 0.0 and 10.0"),
    ],
)
def test_what_is_no_rule_is_refused(value, error, message):
    with pytest.raises(error, match=message):
        as_rules("rules", value, 0.0, 10.0)


def test_norms_by_group_are_of_each_parameter_once(model):
    norms = norms_by_group(model)
    assert set(norms) == {group for _, group in GROUPS}
    squares = lambda keys: sum(float(jnp.sum(by_name(model)[key] ** 2)) for key in keys)
    assert float(norms["embedding"]) ** 2 == pytest.approx(squares(["embed", "lm_head"]), rel=1e-5)
    assert float(norms["importance"]) ** 2 == pytest.approx(squares(IMPORTANCE), rel=1e-5)
    rms = [
        "norm",
        "layers.attention_norm",
        "layers.mlp_norm",
        "layers.attention.query_norm",
        "layers.attention.key_norm",
    ]
    assert float(norms["norm"]) ** 2 == pytest.approx(squares(rms), rel=1e-5)
    total = sum(float(norm) ** 2 for norm in norms.values())
    assert float(global_norm(model)) ** 2 == pytest.approx(total, rel=1e-5)


def test_norms_are_float32_and_only_of_what_is_there(model):
    part, _ = split(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model), "importance")
    norms = norms_by_group(part)
    assert set(norms) == {"importance"} and norms["importance"].dtype == jnp.float32
    assert global_norm({}) == 0
