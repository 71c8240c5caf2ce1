"""Held-out loss of batches with masks, along the rows, and how a model selects in held-out text."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import lively_model, random_tokens, small_config

from nosa_jax import locality
from nosa_jax.convert import with_attention
from nosa_jax.model import forward
from nosa_jax.train import Batch, Corpus, evaluate, measure_selection, mixture

LENGTH = 200
ROWS = random_tokens(2, LENGTH + 1, seed=4)


def the_model():
    return lively_model(small_config())  # made once, and not by workers that only collect this file


def batch(rows=ROWS, mask=None, segment_ids=None):
    return Batch(rows[:, :-1], rows[:, 1:], mask, segment_ids)


def nats(rows=ROWS):
    """Cross entropy of every target, by the logits of `forward`."""
    logits = jax.nn.log_softmax(forward(the_model(), rows[:, :-1]).logits)
    return -np.take_along_axis(np.asarray(logits), rows[:, 1:, None], -1)[..., 0]


def masks():
    """Of two batches: the first one with far fewer targets, and none in the last eighth of the row."""
    few, most = np.zeros((2, LENGTH), bool), np.ones((2, LENGTH), bool)
    few[0, 3:40] = True
    most[:, -LENGTH // 8 :] = False
    return few, most


def test_targets_weigh_the_same_whatever_their_batch():
    few, most = masks()
    found = evaluate(the_model(), [batch(mask=few), batch(mask=most)], bytes_per_token=2.0)
    losses = np.concatenate([nats()[few], nats()[most]])
    assert found.tokens == len(losses) and found.loss == pytest.approx(losses.mean(), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(losses.mean() / np.log(2) / 2, rel=1e-5)
    assert found.gamma is None and found.misses == {} and found.bias_by_layer == []


def test_the_loss_by_position_is_of_equal_parts():
    few, most = masks()
    found = evaluate(the_model(), [batch(mask=few), batch(mask=most)]).loss_by_position
    assert list(found) == [str(start) for start in range(0, 175, 25)]  # nothing counts from 175 on
    for start, mean in found.items():
        part = slice(int(start), int(start) + 25)
        losses = np.concatenate([nats()[:, part][mask[:, part]] for mask in (few, most)])
        assert mean == pytest.approx(losses.mean(), rel=1e-5)
    short = evaluate(the_model(), [batch(ROWS[:, :4])]).loss_by_position
    assert list(short) == ["0", "1", "2"]  # rows of three targets have no eight parts


def test_text_a_source_and_batches_say_the_same():
    corpus = Corpus(ROWS[0], random_tokens(LENGTH * 4 + 1, seed=5), bytes_per_token=3.0)
    by_text = evaluate(the_model(), corpus.heldout, batch_size=2, length=LENGTH)
    source = corpus.source(LENGTH)
    by_source = evaluate(the_model(), source, batch_size=2)
    by_batches = evaluate(the_model(), source.heldout(2))
    assert by_source.tokens == LENGTH * 4 and by_source.loss == pytest.approx(by_text.loss, rel=1e-6)
    assert by_source.bits_per_byte == pytest.approx(by_text.bits_per_byte / 3, rel=1e-6)
    assert by_batches.loss == by_source.loss and by_batches.bits_per_byte == pytest.approx(by_text.bits_per_byte)
    assert evaluate(the_model(), source, batch_size=2, max_batches=1).tokens == LENGTH * 2
    by_corpus = evaluate(the_model(), corpus, batch_size=2, length=LENGTH)
    assert (by_corpus.loss, by_corpus.bits_per_byte) == (by_text.loss, pytest.approx(by_source.bits_per_byte))
    rows = corpus.heldout[:-1].reshape(4, LENGTH)
    windows = np.concatenate([rows, corpus.heldout[LENGTH::LENGTH, None]], axis=1)
    for same in (jnp.asarray(corpus.heldout), [windows[:2], jnp.asarray(windows[2:])]):
        sizes = {} if isinstance(same, list) else {"batch_size": 2, "length": LENGTH}
        assert evaluate(the_model(), same, **sizes).loss == pytest.approx(by_text.loss, rel=1e-6)
    assert evaluate(the_model(), batch()) == evaluate(the_model(), [batch()])
    mixed = mixture([(source, 1), (Corpus(ROWS[0], ROWS[0]).source(LENGTH), 3)])
    in_bytes = evaluate(the_model(), mixed, batch_size=1)
    bytes_per_token = (801 * 3 + 201 * 1) / 1002  # by what each holds out, and not 1 : 3
    assert in_bytes.bits_per_byte == pytest.approx(in_bytes.loss / np.log(2) / bytes_per_token)


def test_what_cannot_be_evaluated_is_refused(without_type_checker):
    nothing = Corpus(ROWS[0], ROWS[0, :0]).source(LENGTH)
    with pytest.raises(ValueError, match="tokens: must hold held-out targets that count, got none"):
        evaluate(the_model(), nothing, batch_size=2)
    with pytest.raises(ValueError, match="tokens: must hold held-out targets that count, got none"):
        evaluate(the_model(), [batch(mask=np.zeros((2, LENGTH), bool))])
    with pytest.raises(TypeError, match="batch_size: must be given for this kind of text, got None"):
        evaluate(the_model(), nothing)
    with pytest.raises(TypeError, match="length: must be given"):
        evaluate(the_model(), ROWS[0], batch_size=2)
    with pytest.raises(ValueError, match="max_batches: must be"):
        evaluate(the_model(), [batch()], max_batches=0)


SIZES = {"batch_size": 2, "length": LENGTH}


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (ROWS[0, :50], SIZES, r"tokens: must fill one window of length \+ 1 = 201, got 50 tokens"),
        (Corpus(ROWS[0], ROWS[0, :50]), SIZES, r"Corpus\.heldout: must fill one window"),
        (ROWS, SIZES, r"tokens: must have one dimension, got \(2, 201\)\. .* as batches: \[tokens\]"),
        (ROWS[0] / 2, SIZES, "tokens: must hold integers, got float64"),
        (ROWS[0] + 128, SIZES, r"tokens: must hold token ids below vocab_size = 128, got \d+"),
        (Corpus(ROWS[0], ROWS[0] + 128).source(LENGTH), {"batch_size": 2}, "source: must hold token ids below"),
        (Corpus(ROWS[0], ROWS[0]).source(LENGTH), SIZES | {"length": 9}, "length: must be that of the source, 200"),
        ([batch()], {"batch_size": 2}, "batch_size: must be None where batches are given, which have theirs, got 2"),
        (batch(), {"length": 9}, "length: must be None where batches are given"),
        ([1, 2, 3], {}, r"tokens\[0\]: must be a Batch, or integers \[B, length \+ 1\], got int 1\. Pass text as np"),
        ([batch(), ROWS[0]], {}, r"tokens\[1\]: must be a Batch, .* got int\d+\[201\]"),
        ("some text", {}, "tokens: must be token ids, a Corpus, a Source, or batches, got str 'some text'"),
        (7, {}, "tokens: must be token ids, a Corpus, a Source, or batches, got int 7"),
        (ROWS[0], SIZES | {"bytes_per_token": 0}, "bytes_per_token: must be"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tokens, options, message, without_type_checker):
    with pytest.raises((TypeError, ValueError), match=message):
        evaluate(the_model(), tokens, **options)
    with pytest.raises(TypeError, match="model: must be a NosaLM"):
        evaluate(the_model().config, tokens, **options)


# --- How a model selects -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_selections_are_those_of_the_last_tokens():
    attention = the_model().config.attention
    found = measure_selection(the_model(), batch(), steps=90)
    ids = forward(the_model(), ROWS[:1, :-1], logits="none", record=True).block_ids[..., -91:, :]
    first = LENGTH - 91
    assert found.gamma == pytest.approx(float(locality.gamma(ids)[..., 1:].mean()), rel=1e-6)
    assert list(found.misses) == ["8", "10", "12", "16"]
    for slots, misses in found.misses.items():
        expected = locality.replay_misses(ids, first, attention, int(slots))[..., 1:].mean()
        assert misses == pytest.approx(float(expected), rel=1e-6)
    assert found.misses["8"] > 0
    whole = measure_selection(the_model(), batch(), steps=10_000)
    assert whole == measure_selection(the_model(), batch(), steps=LENGTH) != found
    assert whole.bias_by_layer == found.bias_by_layer  # of all tokens in either case


@pytest.mark.slow
def test_the_longest_document_counts_as_if_alone():
    documents = np.full((2, LENGTH), -1, np.int32)
    documents[0, :64], documents[0, 64:150] = 0, 1
    documents[1, :48], documents[1, 48:184] = 0, 3  # 136 tokens, then padding
    packed = measure_selection(the_model(), batch(segment_ids=documents), steps=100)
    tokens = np.zeros((1, LENGTH), np.int32)
    tokens[0, :136] = ROWS[1, 48:184]
    alone = np.where(np.arange(LENGTH) < 136, 0, -1).astype(np.int32)[None]
    assert packed == measure_selection(the_model(), Batch(tokens, tokens, None, alone), steps=100)
    ids = forward(the_model(), tokens[:, :136], logits="none", record=True).block_ids[..., -101:, :]
    assert packed.gamma == pytest.approx(float(locality.gamma(ids)[..., 1:].mean()), rel=1e-6)
    short = measure_selection(
        the_model(), batch(segment_ids=np.where(np.arange(LENGTH) < 64, documents, -1)), steps=100
    )
    # 64 tokens, fewer than the steps, are 4 blocks, all of which are selected: only new blocks are not kept.
    assert short.gamma == pytest.approx((60 + 1 / 2 + 2 / 3 + 3 / 4) / 63, rel=1e-6)
    assert set(short.misses.values()) == {0.0}


@pytest.mark.slow
def test_the_bias_is_the_root_mean_square_of_the_importance():
    scaled = with_attention(the_model())
    scaled.layers.attention.importance = jax.tree.map(jnp.zeros_like, the_model().layers.attention.importance)
    scaled.layers.attention.importance.A[...] = jnp.array([[3.0, 3.0], [1.0, 7.0]])
    found = measure_selection(scaled, batch()).bias_by_layer
    np.testing.assert_allclose(found, np.log(2) * np.array([3.0, 5.0]), rtol=1e-6)  # softplus(0) is ln 2


def test_variants_without_selection_or_bias():
    assert measure_selection(with_attention(the_model(), variant="full"), batch()) is None
    assert measure_selection(with_attention(the_model(), variant="infllmv2"), batch()).bias_by_layer == []
    assert measure_selection(the_model(), batch(segment_ids=np.full((2, LENGTH), -1))) is None
    with pytest.raises(ValueError, match="steps: must be"):
        measure_selection(the_model(), batch(), steps=0)


def test_an_evaluation_holds_both_as_json():
    found = evaluate(the_model(), [batch()], selection=True)
    measured = dataclasses.asdict(measure_selection(the_model(), batch()))
    record = dataclasses.asdict(found)
    assert json.loads(json.dumps(record)) == record and measured.items() <= record.items()
    assert evaluate(with_attention(the_model(), variant="full"), [batch()], selection=True).gamma is None


_MESHES = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
from test_train_evaluation import the_model, batch, evaluate
from nosa_jax import parallel

alone = evaluate(the_model(), [batch()], selection=True)
for axes in ({"data": 2, "fsdp": 2}, {"tensor": 2, "context": 2}):
    for explicit in (False, True):
        found = evaluate(
            parallel.shard(the_model(), parallel.make_mesh(**axes, explicit=explicit)), [batch()], selection=True
        )
        assert abs(found.loss - alone.loss) < 1e-5 * alone.loss, (axes, found)
        assert found.gamma == alone.gamma and found.misses == alone.misses, (axes, found)
print("same")
"""

_PROCESSES = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import dataclasses, json
from jax.sharding import NamedSharding, PartitionSpec
from test_train_evaluation import the_model, batch, evaluate
from nosa_jax import parallel

mesh = parallel.make_mesh(**json.loads(sys.argv[3]))
model = the_model()
model = jax.tree.map(parallel.from_host, jax.tree.map(jax.device_get, model), parallel.shardings(model, mesh))
rows = NamedSharding(mesh, PartitionSpec(parallel.ROWS, "context"))
whole, placed = batch(), jax.tree.map(lambda leaf: parallel.from_host(leaf, rows), batch())
for each in (whole, placed):
    print("found", json.dumps(dataclasses.asdict(evaluate(model, [each], selection=True))))
"""


@pytest.mark.slow
def test_on_meshes_it_says_what_one_device_says():
    done = subprocess.run(
        [sys.executable, "-c", _MESHES], capture_output=True, text=True, timeout=600, cwd=Path(__file__).parent
    )
    assert done.stdout.strip() == "same", done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes", [{"fsdp": 2, "tensor": 2}, {"tensor": 2, "context": 2}], ids=lambda axes: "-".join(axes)
)
def test_two_processes_say_what_one_says(axes, free_address):
    """Neither of them can see the other's part of the model, nor of anything computed that is not everywhere."""
    command = [sys.executable, "-c", _PROCESSES, free_address]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": Path(__file__).parent}
    runs = [subprocess.Popen([*command, str(process), json.dumps(axes)], **pipes) for process in range(2)]
    ends = [run.communicate(timeout=600) for run in runs]
    alone, measured = evaluate(the_model(), [batch()]), measure_selection(the_model(), batch())
    for out, err in ends:
        found = [json.loads(line.removeprefix("found ")) for line in out.splitlines() if line.startswith("found ")]
        assert len(found) == 2, err[-3000:]  # rows that every process has, and rows on the mesh
        for each in found:
            assert each["loss"] == pytest.approx(alone.loss, rel=1e-5)
            assert each["gamma"] == measured.gamma and each["misses"] == measured.misses


@pytest.fixture
def free_address():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
