"""What a run can be given: sources, losses, optimizers and numbers of the user's own, parts that train, meshes."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from support import lively_model, small_config

import nosa_jax
from nosa_jax import parallel, train
from nosa_jax._pytree import by_name
from nosa_jax.model import forward

pytestmark = pytest.mark.usefixtures("undrawn")

MODEL = dataclasses.replace(small_config(), vocab_size=256)
BLOCK = MODEL.attention.block_size
OPTIMIZER = train.OptimizerConfig(learning_rate=1e-2, warmup_fraction=0.0)
CONFIG = train.TrainConfig(
    MODEL,
    OPTIMIZER,
    steps=4,
    batch_size=2,
    length=2 * BLOCK,
    log_every=1,
    eval_every=2,
    eval_batches=1,
    eval_selection=False,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> train.Source:
    folder = tmp_path_factory.mktemp("text")
    for name in "abcdef":
        (folder / name).write_text("abcdefghij" * 30 + name)
    return train.text(sorted(folder.iterdir()), length=CONFIG.length, block_size=BLOCK, heldout_fraction=0.2)


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return parallel.make_mesh(devices=jax.devices()[:1])


def run(source, directory=None, **options):
    fields = {field.name for field in dataclasses.fields(CONFIG)} - {"model", "optimizer"}
    changed = {name: options.pop(name) for name in list(options) if name in fields}
    return train.train(dataclasses.replace(CONFIG, **changed), source, directory, progress=False, **options)


@pytest.mark.slow
def test_a_source_is_trained_on_and_evaluated(source, tmp_path):
    result = run(source, tmp_path, evaluation=lambda model: {"layers": float(model.config.num_layers)})
    losses = [record["loss"] for record in result.history]
    assert losses[-1] < losses[0] and [record["step"] for record in result.evaluations] == [2, 4]
    assert all(record["layers"] == 2 and record["tokens"] > 0 for record in result.evaluations)
    assert result.history[0]["skipped"] == 0
    assert {"grad_norm_importance", "param_norm_mlp"} <= result.history[0].keys()
    start = train.read_log(tmp_path / "log.jsonl")[0]
    assert start["corpus"] == {
        "train_tokens": source.train_tokens,
        "heldout_tokens": source.heldout_tokens,
        "fingerprint": source.fingerprint(),
    }


@pytest.mark.slow
def test_only_importance_trains_and_only_it_has_moments(source, tmp_path):
    model = lively_model(MODEL)
    result = run(source, tmp_path, model=model, trainable="importance", checkpoint_every=2)
    before, after = by_name(model), by_name(result.model)
    moved = {name for name in before if (np.asarray(before[name]) != np.asarray(after[name])).any()}
    assert moved == {"layers.attention.importance.A", "layers.attention.importance.delta"}
    kept = json.loads((tmp_path / "checkpoints" / "4" / "optimizer" / "_METADATA").read_text())["tree_metadata"]
    moments = {name for name in kept if "mu" in name or "nu" in name}
    assert moments and all("importance" in name for name in moments)


@pytest.mark.slow
def test_an_optimizer_and_a_loss_of_ones_own(source):
    def loss(model, batch):
        return jnp.square(forward(model, batch.tokens, segment_ids=batch.segment_ids, logits="none").hidden).mean()

    result = run(source, optimizer=optax.sgd(1e-2), loss=loss)
    values = [record["loss"] for record in result.history]
    assert values == sorted(values, reverse=True) and "learning_rate" not in result.history[0]


def bad_at(*steps: int):
    """A loss that is NaN in some steps: it looks at how far A has come, which SGD moves by one a step."""

    def loss(model, batch):
        count = model.layers.attention.importance.A[...][0, 0]
        return jnp.where(jnp.isin(jnp.round(count), jnp.array(steps)), jnp.nan, -count)

    return loss


def counting_model() -> nosa_jax.NosaLM:
    model = lively_model(MODEL)
    model.layers.attention.importance.A[...] = jnp.zeros_like(model.layers.attention.importance.A[...])
    return model


def test_steps_that_are_not_finite_are_skipped_until_there_are_too_many(source, tmp_path):
    """The model stays where the loss is NaN, so that every later step is skipped, too."""
    options = {"optimizer": optax.sgd(1.0), "loss": bad_at(2), "model": counting_model(), "steps": 9}
    with pytest.raises(FloatingPointError, match=r"loss: must stay finite, got nan in step 5.*not_finite-5-0\.npz"):
        run(source, tmp_path, max_skipped=3, checkpoint_every=0, **options)
    log = [record for record in train.read_log(tmp_path / "log.jsonl") if record["kind"] == "train"]
    assert [record["skipped"] for record in log] == [0, 0, 1, 2, 3]
    with np.load(tmp_path / "not_finite-5-0.npz") as kept:
        assert kept["tokens"].shape == (CONFIG.batch_size, CONFIG.length)
        feed = source.batches(CONFIG.batch_size, seed=CONFIG.seed)
        batches = [next(feed) for _ in range(5)]
        np.testing.assert_array_equal(kept["tokens"], batches[4].tokens)


@pytest.mark.slow
def test_a_run_may_end_with_skipped_steps(source):
    options = {"optimizer": optax.sgd(1.0), "loss": bad_at(2), "model": counting_model()}
    result = run(source, max_skipped=3, eval_every=0, **options)
    assert result.history[-1]["skipped"] == 2
    assert float(result.model.layers.attention.importance.A[...][0, 0]) == 2


@pytest.mark.slow
def test_a_mesh_of_one_device_changes_nothing(source, mesh, tmp_path):
    alone, placed = run(source), run(source, tmp_path, mesh=mesh)
    np.testing.assert_allclose([r["loss"] for r in placed.history], [r["loss"] for r in alone.history], rtol=1e-6)
    assert isinstance(placed.model.embed[...].sharding, NamedSharding)
    loaded = train.load_model(tmp_path / "checkpoints", mesh=mesh)
    assert isinstance(loaded.embed[...].sharding, NamedSharding)
    assert not isinstance(train.load_model(tmp_path / "checkpoints").embed[...].sharding, NamedSharding)


def test_folders_are_read_onto_a_mesh(mesh, tmp_path):
    model = lively_model(MODEL)
    nosa_jax.save_pretrained(parallel.shard(model, mesh), tmp_path)
    for again in (nosa_jax.from_pretrained(tmp_path), nosa_jax.from_pretrained(tmp_path, mesh=mesh)):
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
            np.testing.assert_array_equal(a, b)
    assert isinstance(again.layers.mlp.down[...].sharding, NamedSharding)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": BLOCK}, "TrainConfig.length: must be that of the source"),
        ({"trainable": "*nothing*"}, "TrainConfig.trainable: must match names of parameters"),
        ({"max_skipped": 0}, "TrainConfig.max_skipped: must be >= 1, got 0"),
        ({"optimizer": "adam"}, "optimizer: must be an OptimizerConfig or an optax.GradientTransformation"),
        ({"mesh": "data=2"}, "mesh: must be a Mesh"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(source, tmp_path, without_type_checker, change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        run(source, tmp_path / "run", **change)
    assert not (tmp_path / "run").exists()


def test_what_is_no_source_is_refused(without_type_checker):
    with pytest.raises(TypeError, match=r"source: must be a Source, got list .*Pass train.text\(files\)"):
        run([1, 2])


def test_packed_documents_start_on_the_model_s_blocks(tmp_path):
    (tmp_path / "a").write_text("a" * 400)
    files = [tmp_path / "a"]
    odd = train.text(files, length=CONFIG.length, block_size=BLOCK // 2, heldout_fraction=0.0)
    with pytest.raises(ValueError, match=rf"source: documents must start on blocks .* Make it with block_size={BLOCK}"):
        run(odd)
