"""Meshes, and what lies where on them: nothing here needs more than one device."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import small_config

from nosa_jax import NosaLM, parallel, train
from nosa_jax._pytree import by_name

FULL = {"qkv_bias": True, "qk_norm": True, "output_bias": True, "tie_embeddings": False}


def abstract(kind: AxisType = AxisType.Auto, **axes: int) -> AbstractMesh:
    """A mesh of devices that nobody has, with all four axes unless these are others."""
    axes = axes if set(axes) - set(parallel.AXES) else {name: axes.get(name, 1) for name in parallel.AXES}
    return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))


def shapes_of_state(optimizer: train.OptimizerConfig, **config) -> train.TrainState:
    config = dataclasses.replace(small_config(), **config)
    return jax.eval_shape(lambda: train.init_state(NosaLM(config, rngs=nnx.Rngs(0)), optimizer))


# ---- make_mesh ----


@pytest.mark.parametrize("explicit", [False, True])
def test_a_mesh_has_all_axes(explicit):
    mesh = parallel.make_mesh(devices=jax.devices()[:1], explicit=explicit)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}
    assert set(mesh.axis_types) == {AxisType.Explicit if explicit else AxisType.Auto}
    assert parallel.make_mesh(fsdp=-1, devices=jax.devices()[:1]) == parallel.make_mesh(devices=jax.devices()[:1])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 2}, r"must multiply to the number of devices, 1, got data=2, fsdp=1.*give one as -1"),
        ({"data": 2, "fsdp": -1}, "must multiply to the number of devices, 1"),
        ({"data": -1, "fsdp": -1}, "at most one of them -1"),
        ({"tensor": 0}, "must be positive"),
        ({"tensor": -2}, "tensor: must be >= -1, got -2"),
    ],
)
def test_sizes_that_do_not_make_up_the_devices(sizes, message):
    with pytest.raises(ValueError, match=message):
        parallel.make_mesh(**sizes, devices=jax.devices()[:1])


def test_sizes_are_integers(without_type_checker):
    with pytest.raises(TypeError, match="context"):
        parallel.make_mesh(context=2.0)


# ---- what lies where ----

WHOLE = ("norm", "attention_norm", "mlp_norm", "query_norm", "key_norm", "output_bias", "A")
CUT = {
    "embed": P(None, "fsdp"),
    "lm_head": P("fsdp", "tensor"),
    "layers.attention.qkv": P(None, "fsdp", "tensor"),
    "layers.attention.qkv_bias": P(None, "tensor"),
    "layers.attention.output": P(None, "tensor", "fsdp"),
    "layers.attention.importance.delta": P(None, "tensor"),
    "layers.mlp.gate_up": P(None, "fsdp", None, "tensor"),
    "layers.mlp.down": P(None, "tensor", "fsdp"),
}


def test_every_parameter_has_a_place():
    """The rules cut all matrices; vectors and what they do not name are whole. Axes of one device are not named."""
    model = shapes_of_state(train.OptimizerConfig(), **FULL).model
    everywhere, tensor_alone = (
        by_name(parallel.specs(model, mesh)) for mesh in (abstract(data=2, fsdp=2, tensor=2), abstract(tensor=2))
    )
    for name, leaf in by_name(model).items():
        cut = CUT.get(name, P())
        assert (cut == P()) == (name.rpartition(".")[2] in WHOLE), name
        assert everywhere[name] == cut, name
        assert "fsdp" not in tuple(tensor_alone[name]) and len(tensor_alone[name]) <= leaf.ndim, name
        assert ("tensor" in tuple(tensor_alone[name])) == ("tensor" in tuple(cut)), name
        assert not tensor_alone[name] or tensor_alone[name][-1] is not None, name
    assert set(CUT) <= set(by_name(model))


def test_moments_lie_as_their_parameters_do():
    """The state of any optimizer goes by the names in it; numbers are whole."""
    mesh = abstract(fsdp=2, tensor=2)
    state = shapes_of_state(train.OptimizerConfig(learning_rate_multipliers=(("*importance*", 50.0),)), **FULL)
    placed = by_name(parallel.shardings(state, mesh))
    of_model = {name: placed[f"model.{name}"] for name in by_name(state.model)}
    moments = 0
    for name, sharding in placed.items():
        assert isinstance(sharding, NamedSharding) and sharding.mesh == mesh
        if name.startswith("opt_state") and ("mu" in name.split(".") or "nu" in name.split(".")):
            parameter = max((last for last in of_model if name.endswith(f".{last}")), key=len)
            moments += 1
            assert sharding == of_model[parameter], name
        elif not name.startswith("model."):
            assert sharding.spec == P(), name
    assert moments >= 2 * len(CUT)


def test_moments_of_another_rank_lie_whole():
    """As the factors that Adafactor keeps in place of a moment."""
    mesh = abstract(fsdp=2)
    model = jax.eval_shape(lambda: NosaLM(small_config(), rngs=nnx.Rngs(0)))
    factored = by_name(
        parallel.specs(jax.eval_shape(optax.adafactor(1e-3, min_dim_size_to_factor=8).init, model), mesh)
    )
    rows = {name: wanted for name, wanted in factored.items() if "v_row" in name}
    assert rows and set(rows.values()) == {P()}
    assert by_name(parallel.specs(model, mesh))["embed"] == P(None, "fsdp")


def test_a_mesh_that_does_not_divide_is_refused_with_all_that_it_cuts():
    state = shapes_of_state(train.OptimizerConfig())
    with pytest.raises(ValueError, match=r"mesh: must divide what it cuts") as error:
        parallel.shardings(state.model, abstract(fsdp=5, tensor=4))
    message = str(error.value)
    assert "embed: 48 by fsdp=5 (nearest: 4)" in message
    assert "attention.qkv: 48 by fsdp=5 (nearest: 4); layers.attention.qkv: 2 by tensor=4 (nearest: 2)" in message
    assert "layers.mlp.down" in message and "norm" not in message


def test_shapes_get_their_places_and_stay_shapes():
    mesh = abstract(fsdp=2)
    model = parallel.shard(shapes_of_state(train.OptimizerConfig()).model, mesh)
    assert isinstance(model.embed.get_value(), jax.ShapeDtypeStruct)
    assert by_name(model)["embed"].sharding == NamedSharding(mesh, P(None, "fsdp"))


# ---- the mesh that is computed on ----


def test_axes_that_no_rule_knows():
    """On Explicit axes types would not fit; on Auto ones the partitioner does what it can."""
    with pytest.raises(ValueError, match=r"mesh: axes must be among \('data', 'fsdp'.*\['rows'\].*make_mesh"):
        parallel.shardings({"embed": jnp.ones((2, 2))}, abstract(rows=2, data=2))
    with jax.sharding.use_abstract_mesh(abstract(rows=2)):
        assert parallel.mesh_of() is None
    with (
        jax.sharding.use_abstract_mesh(abstract(AxisType.Explicit, rows=2)),
        pytest.raises(ValueError, match="axes must be among"),
    ):
        parallel.mesh_of()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_the_mesh_of_the_context_is_found(kind):
    mesh = abstract(kind, data=2)
    assert parallel.mesh_of(jnp.ones(3)) is None
    with jax.sharding.use_abstract_mesh(mesh):
        assert parallel.mesh_of(np.ones(3)) == mesh
        # Ops compute on automatic axes only, where `run` has brought them.
        assert parallel.current() == (mesh if kind == AxisType.Auto else None)
    with jax.sharding.use_abstract_mesh(abstract(kind)):
        assert parallel.mesh_of(np.ones(3)) is None and parallel.current() is None


@pytest.mark.parametrize(
    ("shape", "wanted", "fits"),
    [
        ((8, 6), P(("data", "fsdp"), "tensor"), P(("data", "fsdp"), "tensor")),
        ((2, 6), P(("data", "fsdp"), "tensor"), P("data", "tensor")),  # as many as divide together
        ((4, 6), P(("fsdp", "data")), P("fsdp")),
        ((3, 5), P(("data", "fsdp"), "tensor"), P(None, None)),
        ((8, 8), P("context", "rows"), P(None, None)),  # of one device; of no mesh of ours
    ],
)
def test_axes_that_divide_a_shape(shape, wanted, fits):
    assert parallel.fitting(abstract(data=2, fsdp=4, tensor=2), shape, wanted) == fits


# ---- the order of queries ----


@given(size=st.integers(2, 8), piece=st.integers(1, 5), rows=st.integers(1, 3))
def test_queries_are_shared_evenly(size, piece, rows):
    """Devices have the same number of queries, ascending, and the same number of keys that these see."""
    length = 2 * size * piece
    with jax.sharding.use_abstract_mesh(abstract(context=size)):
        order = parallel.query_order(length)
        assert parallel.context_size(length) == size
    of_devices = order.reshape(size, -1)
    assert sorted(order) == list(range(length))
    assert (np.diff(of_devices, axis=1) > 0).all()
    assert len({int((queries + 1).sum()) for queries in of_devices}) == 1


@settings(max_examples=15)  # each shape is compiled
@given(size=st.integers(2, 6), length=st.integers(2, 60), axis=st.integers(0, 1))
def test_row_order_comes_back(size, length, axis):
    x = jnp.arange(2 * length).reshape((length, 2) if axis == 0 else (2, length))
    with jax.sharding.use_abstract_mesh(abstract(context=size)):
        cut = parallel.query_order(length) is not None
        assert cut == (length % (2 * size) == 0)
        there = parallel.in_query_order(x, axis)
        assert cut == bool((there != x).any())
        np.testing.assert_array_equal(parallel.in_row_order(there, axis), x)


def test_rows_that_are_not_cut_keep_their_order():
    x = jnp.arange(8)
    assert parallel.query_order(8) is None and parallel.in_query_order(x, 0) is x and parallel.in_row_order(x, 0) is x
