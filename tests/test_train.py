"""Loss, optimizer, steps, checkpoints and the loop."""

import dataclasses
import json
import math
import os
import signal
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from nosa_jax import presets, save_pretrained
from nosa_jax.config import ModelConfig, RopeConfig
from nosa_jax.convert import with_attention
from nosa_jax.model import NosaLM, forward
from nosa_jax.train import (
    Checkpoints,
    Corpus,
    OptimizerConfig,
    TrainConfig,
    evaluate,
    init_state,
    jit_train_step,
    learning_rate_schedule,
    load_model,
    make_optimizer,
    model_config_from_dict,
    next_token_loss,
    read_log,
    train,
)
from nosa_jax.train.optim import decays

MODEL = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    attention=dataclasses.replace(presets.tiny().attention, num_selected_blocks=6),
)
pytestmark = pytest.mark.usefixtures("undrawn")

OPTIMIZER = OptimizerConfig(learning_rate=1e-2)
CONFIG = TrainConfig(
    MODEL, OPTIMIZER, steps=6, batch_size=2, length=24, log_every=1, eval_every=2, eval_batches=2, eval_selection=False
)


def make_corpus(seed=0):
    """Counting modulo 32, now and then with a jump: easy to learn."""
    jumps = np.random.default_rng(seed).random(3000) < 0.05
    tokens = (np.arange(3000) + 7 * np.cumsum(jumps)) % 32
    return Corpus(tokens[:2500].astype(np.uint8), tokens[2500:].astype(np.uint8))


CORPUS = make_corpus()
TOKENS = np.stack([CORPUS.train[:25], CORPUS.train[100:125]]).astype(np.int32)


def make_model(config=MODEL, seed=0):
    return NosaLM(config, rngs=nnx.Rngs(seed))


def leaves_equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# Optimizer.


def test_schedule_rises_stays_and_falls():
    config = OptimizerConfig(learning_rate=1.0, final_learning_rate=0.5, warmup_fraction=0.2, decay_fraction=0.4)
    rate = learning_rate_schedule(config, 10)
    expected = [0.5, 1, 1, 1, 1, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.5]
    np.testing.assert_allclose([rate(step) for step in range(12)], expected, rtol=1e-6)


@pytest.mark.slow
def test_weight_decay_moves_matrices_only():
    model = make_model()
    names = {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): decays(path)
        for path, leaf in jax.tree.leaves_with_path(model)
    }
    vectors = {"norm", "layers.attention_norm", "layers.mlp_norm", "layers.attention.importance.A"}
    assert {name for name, decayed in names.items() if not decayed} == vectors
    assert len(names) == 11

    model.layers.attention.importance.A[...] = jnp.ones_like(model.layers.attention.importance.A[...])
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, warmup_fraction=0.0, weight_decay=0.5), 10)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, model), optimizer.init(model), model)
    after = optax.apply_updates(model, updates)
    for (path, old), new in zip(jax.tree.leaves_with_path(model), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(new, 0.95 * old if decays(path) else old, rtol=1e-6)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"learning_rate": -1.0}, "OptimizerConfig.learning_rate: must lie between 0.0 and 1.0"),
        ({"clip_norm": math.nan}, "OptimizerConfig.clip_norm: .* finite, got nan"),
        ({"warmup_fraction": 0.8}, r"warmup_fraction \+ decay_fraction <= 1, got 0.8 \+ 0.3. Use at most 0.2"),
    ],
)
def test_bad_optimizer_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**fields)


# Steps.


def new_state(seed=0):
    return jax.device_put(init_state(make_model(seed=seed), OPTIMIZER), jax.devices()[0])


def step(state, *, compute_dtype="float32", accumulate=1, remat=False):
    """The same options and placement as in `train`, so that the tests share what is compiled."""
    options = {"compute_dtype": compute_dtype, "accumulate": accumulate, "remat": remat}
    return jit_train_step(state, TOKENS, optimizer=OPTIMIZER, steps=6, **options)


def test_steps_learn_compile_once_and_leave_the_callers_model_alone():
    model = make_model()
    before = jax.tree.map(np.array, model)
    state = jax.device_put(init_state(model, OPTIMIZER), jax.devices()[0])
    losses = []
    compiled = jit_train_step._cache_size()
    for _ in range(8):
        state, metrics = step(state)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1
    assert jit_train_step._cache_size() <= compiled + 1
    assert int(state.step) == 8
    assert set(metrics) == {"loss", "grad_norm", "learning_rate"}
    assert float(metrics["grad_norm"]) > 0 == float(metrics["learning_rate"])
    assert leaves_equal(before, model)
    assert jax.tree.structure(state.model) == jax.tree.structure(model)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.model))


def test_every_parameter_learns():
    """`delta` gets a gradient once `A` has left zero, that is, from the second step on."""
    old = make_model()
    state = new_state()
    for _ in range(3):
        state, _ = step(state)
    for (path, before), after in zip(jax.tree.leaves_with_path(old), jax.tree.leaves(state.model), strict=True):
        assert np.abs(after - before).max() > 1e-3, jax.tree_util.keystr(path)


def test_accumulation_and_remat_change_rounding_only():
    plain, plain_metrics = step(new_state())
    frugal, metrics = step(new_state(), accumulate=2, remat=True)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], plain_metrics[name], rtol=1e-5)
    # Adam's first step is the sign of the gradient: compare the gradients behind it, its first moment.
    for a, b in zip(jax.tree.leaves(frugal.opt_state[1].mu), jax.tree.leaves(plain.opt_state[1].mu), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_bfloat16_computes_low_and_stores_high():
    exact = step(new_state())[1]["loss"]
    state, metrics = step(new_state(), compute_dtype="bfloat16")
    assert metrics["loss"].dtype == jnp.float32
    assert metrics["loss"] != exact
    np.testing.assert_allclose(metrics["loss"], exact, rtol=1e-2)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.model))


def test_accumulate_must_divide_the_batch():
    with pytest.raises(ValueError, match="accumulate: must divide the batch size 2, got 3"):
        step(new_state(), accumulate=3)


def test_evaluation_is_the_loss_over_all_its_tokens():
    model = make_model()
    result = evaluate(model, CORPUS.heldout, batch_size=2, length=24, max_batches=100)
    tokens = np.stack([CORPUS.heldout[i * 24 : i * 24 + 25] for i in range(20)]).astype(np.int32)
    logits = jax.jit(lambda model, tokens: forward(model, tokens).logits)(model, tokens[:, :-1])
    assert result.tokens == 480
    assert result.loss == pytest.approx(float(next_token_loss(logits, jnp.asarray(tokens[:, 1:]))[0]), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2))


# Checkpoints.


def test_a_checkpoint_returns_the_state_to_the_bit(tmp_path):
    state, _ = step(new_state())
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
        path = checkpoints.save(state, {"data": {"next_index": 1}})
        assert path == tmp_path / "1" and path.is_dir()
    with Checkpoints(tmp_path) as checkpoints:
        like = jax.eval_shape(new_state)
        restored = checkpoints.restore(like)
        assert checkpoints.meta() == {"data": {"next_index": 1}}
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert leaves_equal(restored, state)


def test_a_checkpoint_of_another_shape_or_variant_is_refused(tmp_path):
    abstract = lambda config: jax.eval_shape(lambda: init_state(make_model(config), OPTIMIZER))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(new_state(), {})
        found = r"got float32\[2, 32, 16\] in .*/0\. Use the configuration"
        with pytest.raises(ValueError, match=rf"model.layers.mlp.down: must be float32\[2, 48, 16\], {found}"):
            checkpoints.restore(abstract(dataclasses.replace(MODEL, intermediate_size=48)))
        with pytest.raises(ValueError, match=r"model.layers.attention.importance.A: must be absent, got float32"):
            checkpoints.restore(abstract(MODEL.with_attention(variant="full")))
        with pytest.raises(ValueError, match=r"step: must be one of the steps saved, \[0\], got 5"):
            checkpoints.restore(abstract(MODEL), step=5)


def test_a_checkpoint_of_another_layout_of_the_weights_is_refused(tmp_path):
    """An old one, from before there was a number, and one to come: on resuming and on loading, with what to do."""
    train(CONFIG, CORPUS, tmp_path, progress=False, on_record=interrupt_at(1))
    file = tmp_path / "checkpoints" / "1" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    assert meta.pop("layout") == 2
    for content, layout in ((meta, 1), (meta | {"layout": 3}, 3)):
        file.write_text(json.dumps(content))
        refused = rf"directory: must hold weights of layout 2, got layout {layout} in .*Save it as a Hugging Face"
        with pytest.raises(ValueError, match=refused):
            train(CONFIG, CORPUS, tmp_path, resume=True, progress=False)
        with pytest.raises(ValueError, match=refused):
            load_model(tmp_path / "checkpoints")


def test_there_must_be_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="directory: must hold a checkpoint, got none in"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="directory: must exist"):
        load_model(tmp_path / "missing")


def test_configurations_survive_json():
    factors = tuple(float(i) for i in range(1, 5))
    rope = RopeConfig(kind="longrope", short_factor=factors, long_factor=factors, original_max_context=64)
    for config in (MODEL, dataclasses.replace(MODEL, rope=rope), presets.nosa_8b()):
        assert model_config_from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


# The loop.


def interrupt_at(step):
    """Presses Ctrl-C when `step` is logged."""

    def on_record(record):
        if record["kind"] == "train" and record["step"] == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_record


def test_an_interrupted_run_resumes_to_the_bit(tmp_path, capsys):
    straight = train(CONFIG, CORPUS, progress=False)
    before = signal.getsignal(signal.SIGINT)
    first = train(CONFIG, CORPUS, tmp_path, resume=True, on_record=interrupt_at(3))
    assert first.interrupted and first.step == 3
    assert first.directory == tmp_path
    out = capsys.readouterr().out
    assert f"There is no checkpoint in {tmp_path}: from the start.\n" in out
    assert f"Interrupted after step 3: saved {tmp_path}/checkpoints/3; resume=True (--resume) continues" in out
    assert signal.getsignal(signal.SIGINT) is before

    second = train(CONFIG, make_corpus(), tmp_path, resume=True, progress=False)
    assert (second.step, second.interrupted, straight.directory) == (6, False, None)
    assert leaves_equal(straight.model, second.model)
    losses = lambda *results: [record["loss"] for result in results for record in result.history]
    assert losses(straight) == losses(first, second)
    assert straight.evaluations[-1]["loss"] == second.evaluations[-1]["loss"]

    loaded = load_model(tmp_path / "checkpoints")
    assert loaded.config == MODEL and leaves_equal(loaded, straight.model)

    log = read_log(tmp_path / "log.jsonl")
    assert [record["step"] for record in log if record["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in log if record["kind"] == "eval"] == [2, 4, 6]

    finished = train(CONFIG, CORPUS, tmp_path, resume=True, progress=False)
    assert (finished.step, finished.history, finished.interrupted) == (6, [], False)
    assert leaves_equal(finished.model, straight.model) and len(finished.evaluations) == 1


def test_the_log_tells_how_the_run_was_made(tmp_path):
    records = []
    train(CONFIG, CORPUS, tmp_path, progress=False, on_record=records.append)
    start, *rest = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [start, *rest] == json.loads(json.dumps(records))
    assert start["kind"] == "start" and start["seed"] == 0 and start["compute_dtype"] == "float32"
    assert start["config"]["model"]["attention"]["variant"] == "nosa"
    assert {"python", "jax", "flax"} <= {name for name, version in start["versions"].items() if version}
    assert [record["kind"] for record in rest] == ["train", "train", "eval"] * 3
    assert {"step", "loss", "bits_per_byte", "learning_rate", "grad_norm", "tokens_per_second"} <= set(rest[0])
    assert {"step", "loss", "bits_per_byte", "tokens"} <= set(rest[2])


def test_a_used_directory_is_resumed_only_when_asked_and_only_by_the_same_run(tmp_path):
    train(CONFIG, CORPUS, tmp_path, progress=False, on_record=interrupt_at(1))
    with pytest.raises(ValueError, match="directory: must not hold checkpoints yet, got step 1"):
        train(CONFIG, CORPUS, tmp_path, progress=False)
    resume = partial(train, directory=tmp_path, resume=True, progress=False)
    with pytest.raises(ValueError, match=r"TrainConfig.seed: must be 0 as in the checkpoint to resume, got 1"):
        resume(dataclasses.replace(CONFIG, seed=1), CORPUS)
    with pytest.raises(
        ValueError, match=r"as in the checkpoint to resume, got attention.num_query_blocks=1 instead of 2\. Use"
    ):
        resume(dataclasses.replace(CONFIG, model=MODEL.with_attention(num_query_blocks=1)), CORPUS)
    with pytest.raises(ValueError, match="corpus: must be the text of the checkpoint"):
        resume(CONFIG, make_corpus(seed=1))
    part = dataclasses.replace(CONFIG, trainable="importance")
    with pytest.raises(
        ValueError, match=r"TrainConfig.trainable: must train what \* does, as .*, got \*importance\*\."
    ):
        resume(part, CORPUS)
    low = dataclasses.replace(CONFIG.optimizer, moment_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"OptimizerConfig.moment_dtype: must be float32 as in .*, got bfloat16\."):
        resume(dataclasses.replace(CONFIG, optimizer=low), CORPUS)
    os.rename(tmp_path / "checkpoints/1", tmp_path / "checkpoints/9")
    with pytest.raises(ValueError, match=rf"TrainConfig.steps: must be at least 9, .* in {tmp_path}/.*, got 6\. Raise"):
        resume(CONFIG, CORPUS)


def test_continued_pretraining_switches_the_variant_of_a_model(tmp_path):
    dense = make_model(MODEL.with_attention(variant="full"))
    with pytest.raises(
        ValueError, match=r"^model: .* got one with attention.variant='full' instead of 'nosa'\. Change .*with_"
    ):
        train(CONFIG, CORPUS, model=dense, progress=False)
    result = train(CONFIG, CORPUS, model=with_attention(dense, variant="nosa"), progress=False)
    assert result.model.config == MODEL
    assert result.model.layers.attention.importance.A[...].any()
    assert dense.layers.attention.importance is None
    save_pretrained(dense, tmp_path)  # and that of a folder, which nobody else holds
    again = train(CONFIG, CORPUS, model=tmp_path, progress=False)
    assert leaves_equal(again.model.embed[...], result.model.embed[...])
    assert again.model.origin.model_type == "llama"
    with pytest.raises(ValueError, match=r"^model: .* got one with vocab_size=32 instead of 33\. "):
        train(dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, vocab_size=33)), CORPUS, model=tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    model = make_model()
    model.norm[...] = jnp.full_like(model.norm[...], jnp.nan)
    with pytest.raises(FloatingPointError, match=r"loss: must stay finite, got nan in step 1. Lower the learning rate"):
        train(CONFIG, CORPUS, tmp_path, model=model, progress=False)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() is None


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"steps": 0}, "TrainConfig.steps: must be >= 1, got 0"),
        ({"accumulate": 3}, "TrainConfig.accumulate: must divide batch_size 2, got 3"),
        ({"seed": -1}, "TrainConfig.seed: must be >= 0, got -1"),
    ],
)
def test_bad_fields_of_a_run_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **fields)


def test_text_beyond_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"corpus.train: must hold token ids below vocab_size = 32, got 0 .. 99"):
        train(CONFIG, Corpus(np.arange(100), np.arange(10)), progress=False)


def test_heldout_text_must_fill_a_window():
    with pytest.raises(
        ValueError, match=r"corpus.heldout: must be empty or fill one window of length \+ 1 = 25, got 9"
    ):
        train(CONFIG, Corpus(CORPUS.train, CORPUS.heldout[:9]), progress=False)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r'grain is needed for training: pip install "nosa-jax\[train\]"'):
        train(CONFIG, CORPUS, progress=False)


def test_progress_is_shown(capsys):
    train(CONFIG, CORPUS)
    shown = capsys.readouterr()
    assert "tokens/s" in shown.err and "step 6: held-out" in shown.out
