"""The optimizer by groups, its schedules, and steps that are skipped."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nosa_jax._pytree import by_name
from nosa_jax.train import (
    OptimizerConfig,
    Skipped,
    as_optimizer,
    keep_if_finite,
    learning_rate_schedule,
    make_optimizer,
)

# The names of a model with one of each kind of parameter.
PARAMS = {
    "embed": jnp.full((3, 2), 2.0),
    "layers": {
        "attention": {
            "importance": {"A": jnp.ones((2,)), "delta": jnp.ones((2, 2))},
            "qkv": jnp.ones((2, 2)),
            "qkv_bias": jnp.ones((2,)),
        },
        "mlp_norm": jnp.ones((2,)),
    },
}
STILL = jax.tree.map(jnp.zeros_like, PARAMS)
CONSTANT = OptimizerConfig(0.1, warmup_fraction=0.0, schedule="constant", weight_decay=0.5)


def grads_like(scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32), PARAMS)


def first_update(config, grads, params=PARAMS):
    optimizer = make_optimizer(config, 10)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    return by_name(updates)


def run(config, steps=20):
    optimizer = make_optimizer(config, steps)
    params, state = PARAMS, optimizer.init(PARAMS)
    update = jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update(grads_like(seed=step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


# Schedules.


def test_cosine_rises_and_falls_to_the_final_rate():
    config = OptimizerConfig(1.0, 0.2, warmup_fraction=0.2, schedule="cosine")
    rates = np.array([learning_rate_schedule(config, 10)(step) for step in range(12)])
    np.testing.assert_allclose(rates[:2], [0.5, 1.0], rtol=1e-6)
    assert (np.diff(rates[1:11]) < 0).all()
    np.testing.assert_allclose(rates[10:], 0.2, rtol=1e-6)
    middle = learning_rate_schedule(dataclasses.replace(config, warmup_fraction=0.0), 10)(5)
    np.testing.assert_allclose(middle, 0.6, rtol=1e-6)


def test_constant_rises_and_stays():
    config = OptimizerConfig(1.0, warmup_fraction=0.2, schedule="constant")
    np.testing.assert_allclose([learning_rate_schedule(config, 10)(s) for s in (0, 1, 9, 50)], [0.5, 1, 1, 1])


def test_shares_of_two_phases_bind_only_where_there_are_two():
    assert OptimizerConfig(warmup_fraction=0.9, schedule="cosine").schedule == "cosine"


# Groups.


def test_defaults_are_what_they_were():
    """No multipliers, decay of matrices alone, one norm for all: spelled out with optax."""
    config = OptimizerConfig()
    matrices = {"embed": True, "layers": {"attention": {"importance": {"A": False, "delta": True}, "qkv": True,
                "qkv_bias": False}, "mlp_norm": False}}  # fmt: skip
    plain = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(learning_rate_schedule(config, 20), 0.9, 0.95, 1e-8, weight_decay=0.1, mask=matrices),
    )
    params, state = PARAMS, plain.init(PARAMS)
    for step in range(20):
        updates, state = plain.update(grads_like(seed=step), state, params)
        params = optax.apply_updates(params, updates)
    for a, b in zip(jax.tree.leaves(run(config)[0]), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_multipliers_scale_the_whole_update_of_their_group():
    grads = grads_like()
    plain = first_update(CONSTANT, grads)
    fast = first_update(dataclasses.replace(CONSTANT, learning_rate_multipliers=(("*importance*", 50.0),)), grads)
    for name, update in plain.items():
        np.testing.assert_allclose(fast[name], (50 if "importance" in name else 1) * update, rtol=1e-6)


def test_weight_decay_by_pattern_reaches_norms_but_never_biases():
    rules = (("*importance*", 0.0), ("*_norm", 0.25), ("*qkv*", 0.7))
    updates = first_update(dataclasses.replace(CONSTANT, weight_decays=rules), STILL)
    decay = {
        name: -float(update.ravel()[0] / 0.1 / by_name(PARAMS)[name].ravel()[0]) for name, update in updates.items()
    }
    assert decay == pytest.approx({
        "embed": 0.5, "layers.attention.qkv": 0.7, "layers.attention.qkv_bias": 0, "layers.mlp_norm": 0.25,
        "layers.attention.importance.A": 0, "layers.attention.importance.delta": 0})  # fmt: skip


def test_a_weight_decay_of_biases_alone_is_refused():
    with pytest.raises(ValueError, match=r"weight_decays: must match something else than biases.* got '\*bias'"):
        make_optimizer(OptimizerConfig(weight_decays=(("*bias", 0.7),)), 10).init(PARAMS)
    make_optimizer(OptimizerConfig(weight_decays=(("*bias", 0.0),)), 10).init(PARAMS)  # says what is so


def clipped(config, grads):
    """The gradients that reach Adam: its first moment is a tenth of them."""
    optimizer = make_optimizer(config, 10)
    _, state = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    return jax.tree.map(lambda leaf: leaf / (1 - config.beta1), state[1].mu)


def test_groups_are_clipped_apart():
    grads = grads_like(scale=100.0)
    found = clipped(OptimizerConfig(clip_norm=1.0, clip_norms=(("*importance*", 0.1), ("embed", 1e6))), grads)
    norm = lambda tree: float(optax.tree.norm(tree))
    attention = found["layers"]["attention"]
    rest = [attention["qkv"], attention["qkv_bias"], found["layers"]["mlp_norm"]]
    assert norm(attention["importance"]) == pytest.approx(0.1, rel=1e-5)
    assert norm(rest) == pytest.approx(1.0, rel=1e-5)
    np.testing.assert_allclose(found["embed"], grads["embed"], rtol=1e-5)  # below its norm
    together = clipped(OptimizerConfig(clip_norm=1.0), grads)
    assert norm(together) == pytest.approx(1.0, rel=1e-5)


def test_gradients_of_nothing_are_clipped_to_nothing():
    found = clipped(OptimizerConfig(clip_norms=(("embed", 1.0),)), STILL)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("field", ["learning_rate_multipliers", "weight_decays", "clip_norms"])
def test_a_pattern_that_matches_nothing_is_refused_before_the_first_step(field):
    config = OptimizerConfig(**{field: (("*importance*", 1.0), ("*lora*", 2.0))})
    with pytest.raises(ValueError, match=rf"OptimizerConfig.{field}: must match .* got '\*lora\*'.* There are: embed"):
        make_optimizer(config, 10).init(PARAMS)


def test_the_state_knows_neither_steps_nor_patterns():
    plain = make_optimizer(OptimizerConfig(), 10).init(PARAMS)
    rules = {name: (("embed", 2.0),) for name in ("learning_rate_multipliers", "weight_decays", "clip_norms")}
    assert jax.tree.structure(make_optimizer(OptimizerConfig(**rules), 99).init(PARAMS)) == jax.tree.structure(plain)
    assert jax.tree.structure(plain[1].mu) == jax.tree.structure(plain[1].nu) == jax.tree.structure(PARAMS)


def test_moments_in_bfloat16_follow_those_in_float32():
    exact, _ = run(OptimizerConfig())
    near, state = run(OptimizerConfig(moment_dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves((state[1].mu, state[1].nu))} == {jnp.dtype("bfloat16")}
    for a, b, start in zip(*map(jax.tree.leaves, (near, exact, PARAMS)), strict=True):
        assert a.dtype == jnp.float32 and (a != b).any()
        np.testing.assert_allclose(a, b, atol=0.03 * float(jnp.abs(b - start).max()))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"schedule": "linear"}, "OptimizerConfig.schedule: must be 'wsd', 'cosine' or 'constant', got 'linear'"),
        ({"moment_dtype": "float16"}, "OptimizerConfig.moment_dtype: must be 'float32' or 'bfloat16'"),
        ({"moment_dtype": "bfloat16", "beta2": 0.999}, "OptimizerConfig.moment_dtype: must be float32 where beta1"),
        ({"decay_fraction": 0.96}, r"OptimizerConfig.decay_fraction: must satisfy .* got 0.05 \+ 0.96"),
        (
            {"schedule": "cosine", "decay_fraction": 0.5},
            "OptimizerConfig.decay_fraction: must stay 0.3 where .*'cosine'",
        ),
        (
            {"schedule": "constant", "decay_fraction": 0.0},
            "OptimizerConfig.decay_fraction: must stay 0.3 where .*, got 0",
        ),
        (
            {"schedule": "constant", "final_learning_rate": 1e-4},
            "final_learning_rate: must stay 0.0 where .*'constant'",
        ),
        ({"clip_norms": (("*", 0.0),)}, r"OptimizerConfig.clip_norms\['\*'\]: must lie between 1e-06"),
    ],
)
def test_bad_fields_are_refused(fields, message, without_type_checker):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**fields)


def test_rules_are_hashable_however_they_are_given(without_type_checker):
    given = OptimizerConfig(clip_norms=[["*", 1]], weight_decays={"embed": 0.1})
    assert hash(given) == hash(OptimizerConfig(clip_norms=(("*", 1.0),), weight_decays=(("embed", 0.1),)))


def test_any_optax_transformation_is_an_optimizer():
    own = optax.sgd(0.1)
    assert as_optimizer(own, 10) is own
    ours = as_optimizer(CONSTANT, 10)
    assert jax.tree.structure(ours.init(PARAMS)) == jax.tree.structure(make_optimizer(CONSTANT, 10).init(PARAMS))
    with pytest.raises(TypeError, match=r"optimizer: must be an OptimizerConfig or an optax.Gradient.*got str 'adam'"):
        as_optimizer("adam", 10)


# Steps that are skipped.


@jax.jit
def skipping_step(params, state, skipped, loss, grads):
    optimizer = make_optimizer(CONSTANT, 10)
    updates, new_state = optimizer.update(grads, state, params)
    new = optax.apply_updates(params, updates), new_state
    (params, state), skipped, taken = keep_if_finite(skipped, (params, state), new, loss, optax.tree.norm(grads))
    return params, state, skipped, taken


def test_a_step_that_is_not_finite_changes_its_count_alone():
    good = jnp.float32(1.0), grads_like()
    bad_grad = jnp.float32(1.0), {**grads_like(), "embed": PARAMS["embed"].at[0, 0].set(math.nan)}
    bad_loss = jnp.float32(math.inf), grads_like()
    params, state, skipped = PARAMS, make_optimizer(CONSTANT, 10).init(PARAMS), Skipped.none()
    for number, (inputs, total, in_a_row) in enumerate(
        [(good, 0, 0), (bad_grad, 1, 1), (bad_loss, 2, 2), (good, 2, 0), (bad_loss, 3, 1)]
    ):
        before = params, state
        with jax.transfer_guard("disallow"):
            params, state, skipped, taken = skipping_step(params, state, skipped, *inputs)
        unchanged = [
            bool((a == b).all()) for a, b in zip(*map(jax.tree.leaves, (before, (params, state))), strict=True)
        ]
        assert bool(taken) == (inputs is good), number
        assert not any(unchanged) if inputs is good else all(unchanged), number
        assert (skipped.total, skipped.in_a_row) == (total, in_a_row), number
    assert {leaf.dtype for leaf in jax.tree.leaves(skipped)} == {jnp.dtype("int32")}
