"""Runs as files, the stages of the paper, and operations counted."""

import dataclasses
import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nosa_jax import AttentionConfig, ModelConfig, presets
from nosa_jax.config import RopeConfig
from nosa_jax.train import (
    OptimizerConfig,
    TrainConfig,
    continued,
    count_documents,
    flops_per_token,
    mfu,
    model_config_from_dict,
    peak_flops,
    pretrain,
    sft,
)

FACTORS = tuple(float(i) for i in range(1, 17))
LONG = RopeConfig(kind="longrope", short_factor=FACTORS, long_factor=FACTORS, original_max_context=64)
RUN = TrainConfig(
    dataclasses.replace(presets.tiny("dma"), rope=LONG),
    OptimizerConfig(1e-4, schedule="cosine", learning_rate_multipliers=(("*importance*", 50.0),)),
    steps=7,
    trainable=("*importance*", "norm"),
    z_loss=1e-4,
)


# Files.


def test_a_run_survives_its_file(tmp_path):
    RUN.save(tmp_path / "run.json")
    assert TrainConfig.load(tmp_path / "run.json") == RUN
    assert TrainConfig.from_dict(RUN.to_dict()) == RUN
    assert json.loads((tmp_path / "run.json").read_text())["optimizer"]["learning_rate"] == 1e-4


def test_a_run_is_written_by_hand_in_toml(tmp_path):
    """What is not given has its default; tables of patterns are pairs."""
    text = """
    steps = 9
    trainable = ["*importance*"]
    [model]
    vocab_size = 256
    hidden_size = 32
    intermediate_size = 64
    num_layers = 2
    num_heads = 2
    num_kv_heads = 1
    head_dim = 16
    attention.variant = "infllmv2"
    [optimizer]
    learning_rate = 1e-3
    weight_decays = {"*mlp*" = 0.2}
    """
    (tmp_path / "run.toml").write_text(text)
    model = ModelConfig(256, 32, 64, 2, 2, 1, 16, attention=AttentionConfig(variant="infllmv2"))
    optimizer = OptimizerConfig(1e-3, weight_decays=(("*mlp*", 0.2),))
    assert TrainConfig.load(tmp_path / "run.toml") == TrainConfig(
        model, optimizer, steps=9, trainable=("*importance*",)
    )


def changed(*path, value):
    fields = RUN.to_dict()
    table = fields
    for name in path[:-1]:
        table = table[name]
    table[path[-1]] = value
    return fields


@pytest.mark.parametrize(
    "fields, error, message",
    [
        (changed("lr", value=1), ValueError, r"TrainConfig: .* got \['lr'\]. There are: model, optimizer, steps"),
        (
            changed("optimizer", "lr", value=1),
            ValueError,
            r"OptimizerConfig: .* got \['lr'\]. There are: learning",
        ),
        (changed("model", "rope", "base", value=1), ValueError, r"RopeConfig: .* got \['base'\]"),
        (changed("optimizer", value=3), TypeError, "OptimizerConfig: must be a table of fields, got int 3"),
        (changed("steps", value="many"), TypeError, "TrainConfig.steps: must be an int, got 'many'"),
        ({"steps": 3}, TypeError, r"TrainConfig: must have all fields without a default, got none for \['model'\]"),
    ],
)
def test_fields_are_refused_by_name(fields, error, message, without_type_checker):
    with pytest.raises(error, match=message):
        TrainConfig.from_dict(fields)


@pytest.mark.parametrize("name, text, rule", [("run.toml", "a = = 1", "TOML"), ("run.json", "{", "JSON")])
def test_files_of_another_form_are_refused(tmp_path, name, text, rule):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}: must be valid {rule}"):
        TrainConfig.load(tmp_path / name)


def test_a_saved_model_must_be_whole_and_of_this_version():
    fields = dataclasses.asdict(presets.tiny())
    with pytest.raises(LookupError, match="rope"):
        model_config_from_dict({name: value for name, value in fields.items() if name != "rope"})
    with pytest.raises(ValueError, match=r"ModelConfig: .* got \['experts'\]. A later version of nosa-jax wrote them"):
        model_config_from_dict({**fields, "experts": 8})
    with pytest.raises(TypeError):
        model_config_from_dict(None)


# Stages.


def test_stages_are_those_of_the_paper():
    shape = presets.nosa_8b()
    dense = pretrain(shape, tokens=1e9, batch_size=64)
    sparse = continued(shape, tokens=5e9, batch_size=64)
    chat = sft(sparse.model, tokens=1e8, batch_size=8, trainable="importance", remat=False)
    assert [run.model.attention.variant for run in (dense, sparse, chat)] == ["full", "nosa", "nosa"]
    assert [run.length for run in (dense, sparse, chat)] == [4096, 16384, 16384]
    assert sparse.steps == -(-5 * 10**9 // (64 * 16384))
    optimizer = sparse.optimizer
    assert (optimizer.learning_rate, optimizer.final_learning_rate, optimizer.decay_fraction) == (3e-4, 2e-4, 1.0)
    assert (chat.trainable, chat.remat, dense.remat) == (("*importance*",), False, True)
    assert dataclasses.replace(sparse, model=dense.model).model == dense.model == shape.with_attention(variant="full")


def test_stages_take_settings_and_refuse_others():
    own = OptimizerConfig(1.5e-5, 1.3e-5, decay_fraction=0.9)
    run = continued(presets.tiny(), tokens=10, batch_size=2, length=3, variant="dma", optimizer=own, steps=5)
    assert (run.steps, run.optimizer, run.model.attention.variant) == (5, own, "dma")
    with pytest.raises(TypeError, match="epochs"):
        sft(presets.tiny(), tokens=10, batch_size=2, epochs=3)
    with pytest.raises(ValueError, match=r"tokens: must be >= 1.0"):
        pretrain(presets.tiny(), tokens=0, batch_size=2)


# Operations.

SHAPE = dict(vocab_size=10, hidden_size=8, intermediate_size=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4)


def counted(variant, length, selected=4):
    """Every query by itself: which keys and pooled keys it multiplies."""
    attention = AttentionConfig(variant, 4, 4, 2, selected, 1, 2, 1)
    config = ModelConfig(**SHAPE, attention=attention)
    keys = pooled = 0
    for t in range(length):
        blocks = t // 4 + 1
        full = min(blocks, selected) - 1 if attention.is_sparse else blocks - 1
        keys += 4 * full + t % 4 + 1
        pooled += sum(2 * c + 3 <= t for c in range(length))
    per_key = 2 * 3 * 4 * 4  # multiply and add, layers, heads, head dim
    return config, 3 * 2 * per_key * keys / length, per_key * pooled / length * attention.uses_query_scores


@given(variant=st.sampled_from(["full", "infllmv2", "dma", "nosa"]), length=st.integers(1, 70))
def test_attention_is_counted_query_by_query(variant, length):
    config, attention, selection = counted(variant, length)
    flops = flops_per_token(config, length)
    np.testing.assert_allclose(flops.attention, attention, rtol=1e-12)
    np.testing.assert_allclose(flops.selection, selection, rtol=1e-12)


@given(st.lists(st.lists(st.tuples(st.integers(-1, 2), st.integers(1, 9)), min_size=1), min_size=1, max_size=3))
def test_documents_are_counted_alone_and_padding_is_not(rows):
    ids = [np.repeat(*zip(*row, strict=True)) for row in rows]
    width = max(map(len, ids))
    found = count_documents(np.stack([np.pad(row, (0, width - len(row)), constant_values=-1) for row in ids]))
    runs = [list(run) for row in ids for _, run in itertools.groupby(row.tolist())]
    assert found == Counter(len(run) for run in runs if run[0] >= 0)
    if found:
        config, *_ = counted("nosa", 1)
        mean = np.average([flops_per_token(config, n) for n in found], 0, [n * count for n, count in found.items()])
        np.testing.assert_allclose(flops_per_token(config, found), mean, rtol=1e-12)


@pytest.mark.parametrize("length", [0, {}, {0: 1}, {8: 0}])
def test_lengths_of_no_documents_are_refused(length):
    with pytest.raises(ValueError, match=r"length.*: must"):
        flops_per_token(presets.tiny(), length)


def test_matrices_take_six_per_weight():
    config, *_ = counted("full", 1)
    weights = 3 * (8 * 4 * (4 + 2 + 2) + 4 * 4 * 8 + 3 * 8 * 16) + 8 * 10
    assert flops_per_token(config, 5).matmul == 6 * weights
    assert flops_per_token(config.with_attention(variant="nosa"), 5).matmul == 6 * (weights + 3 * 2 * 4 * 2)


def test_sparse_attention_stays_where_dense_attention_grows():
    flops = {v: flops_per_token(presets.nosa_1b(v), 131072).attention for v in ("full", "nosa")}
    assert 15 < flops["full"] / flops["nosa"] < 17  # 65536 keys on average, against 4096


def test_utilisation_is_a_share_of_the_peak():
    flops = flops_per_token(presets.nosa_1b(), 16384)
    rate = 989e12 / (flops.matmul + flops.attention)
    assert mfu(rate, presets.nosa_1b(), 16384, peak=989e12) == pytest.approx(1)
    assert mfu(rate, presets.nosa_1b(), 16384, peak=989e12, devices=4) == pytest.approx(0.25)
    assert mfu(rate, presets.nosa_1b(), 16384, peak=None) is None


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("cpu", None),
    ],
)
def test_peaks_of_cards(kind, peak):
    assert peak_flops(kind) == peak
