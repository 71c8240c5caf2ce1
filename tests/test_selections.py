"""Recorded selections: where they come from, how they are stored and joined."""

import dataclasses
import io
import json
import pickle
import tracemalloc
import types
import zipfile

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from nosa_jax import Selections, plots
from nosa_jax.config import AttentionConfig, ModelConfig

ATTENTION = AttentionConfig(
    block_size=4,
    pooling_window=4,
    pooling_stride=2,
    num_selected_blocks=5,
    num_sink_blocks=1,
    num_local_blocks=2,
    num_query_blocks=1,
)
CONFIG = ModelConfig(
    vocab_size=8,
    hidden_size=8,
    intermediate_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    attention=ATTENTION,
)
LAYERS, HEADS, WIDTH = 2, 2, 5


def select(position, layer, row, head):
    """Any selection that depends on everything: forced blocks and some of the others."""
    own = position // 4
    rng = np.random.default_rng([position, layer, row, head])
    others = [m for m in range(own + 1) if m >= 1 and m < own - 1]
    chosen = {0, own, max(0, own - 1), *rng.permutation(others)[:2].tolist()}
    return [*sorted(chosen), *[-1] * (WIDTH - len(chosen))]


def ids_for(positions):
    """[L, B, K, T, J]; garbage where the position is -1, as a finished row may leave it."""
    positions = np.asarray(positions)
    ids = np.full((LAYERS, len(positions), HEADS, positions.shape[1], WIDTH), 7, np.int32)
    for layer, row, head, t in np.ndindex(ids.shape[:-1]):
        if positions[row, t] >= 0:
            ids[layer, row, head, t] = select(positions[row, t], layer, row, head)
    return ids


def run(positions):
    positions = np.array(positions, np.int32)
    return Selections(np.where((positions >= 0)[:, None, :, None], ids_for(positions), -1), positions, ATTENTION, 16)


def assert_same(a, b):
    np.testing.assert_array_equal(a.positions, b.positions)
    np.testing.assert_array_equal(a.block_ids, b.block_ids)
    for name in ("attention", "head_dim", "itemsize", "label"):
        assert getattr(a, name) == getattr(b, name)


# Two rows: prompts of 6 and 9 tokens, then 5 and 3 generated ones.
PREFILL = [[0, 1, 2, 3, 4, 5, -1, -1, -1], [0, 1, 2, 3, 4, 5, 6, 7, 8]]
DECODE = [[5, 6, 7, 8, 9], [8, 9, 10, -1, -1]]
WHOLE = [[*range(10), -1], [*range(11)]]


def prefill():
    out = types.SimpleNamespace(block_ids=jnp.asarray(ids_for(PREFILL)))
    return Selections.from_forward(out, jnp.array([6, 9]), config=CONFIG)


def decode():
    generation = types.SimpleNamespace(block_ids=jnp.asarray(ids_for(DECODE)), lengths=jnp.array([5, 3]))
    return Selections.from_generation(generation, [6, 9], config=CONFIG)


def test_from_forward():
    assert_same(prefill(), run(PREFILL))
    out = types.SimpleNamespace(block_ids=jnp.asarray(ids_for([range(9)] * 2)))
    assert_same(Selections.from_forward(out, config=CONFIG), run([range(9)] * 2))


def test_from_generation():
    assert_same(decode(), run(DECODE))
    assert decode().label == "nosa"


def test_concatenate_joins_prefill_and_generation():
    assert_same(prefill().concatenate(decode()), run(WHOLE))


def test_sizes_of_numpy_can_be_saved(tmp_path, without_type_checker):
    recorded = dataclasses.replace(run([range(3)]), head_dim=np.int64(32), itemsize=np.int32(4))
    recorded.save(tmp_path / "run.npz")
    assert_same(Selections.load(tmp_path / "run.npz"), recorded)


def test_concatenate_with_nothing_new():
    assert_same(prefill().concatenate(prefill()), prefill())


def test_save_and_load(tmp_path):
    recorded = dataclasses.replace(decode(), label="nosa, 8K text", itemsize=4)
    path = tmp_path / "run"  # no .npz: the name stays as it is
    recorded.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["run"]
    assert_same(Selections.load(path), recorded)


def test_files_are_small_and_keep_importance(tmp_path, without_type_checker):
    recorded = run([range(1010, 1030)])  # up to block 257
    importance = np.linspace(0, 1, 2 * 2 * 30, dtype=np.float32).reshape(2, 1, 2, 30)
    importance[..., 25:] = np.nan
    for name, whole, dtype in (("short", run([range(990, 1020)]), np.uint8), ("long", recorded, np.uint16)):
        whole.save(tmp_path / name)
        with np.load(tmp_path / name) as arrays:
            assert arrays["block_ids"].dtype == dtype
        assert_same(Selections.load(tmp_path / name), whole)
        assert Selections.load(tmp_path / name).importance is None
    kept = dataclasses.replace(recorded, importance=importance)
    kept.save(tmp_path / "kept")
    np.testing.assert_array_equal(Selections.load(tmp_path / "kept").importance, importance)
    np.testing.assert_array_equal(run([range(1005, 1012)]).concatenate(kept).importance, importance)
    less = dataclasses.replace(recorded, importance=importance[..., :20].copy())
    np.testing.assert_array_equal(kept.concatenate(less).importance, importance)
    with pytest.raises(TypeError, match="importance: must be a float32 NumPy array, got float64"):
        dataclasses.replace(recorded, importance=importance.astype(np.float64))
    with pytest.raises(ValueError, match=r"importance: must have shape \[L, B, K, N\]"):
        dataclasses.replace(recorded, importance=importance[:1])


def test_older_files_are_read(tmp_path):
    npz(tmp_path / "run.npz", GOOD | {"format": "nosa-jax selections 1"}, **ARRAYS)
    assert_same(Selections.load(tmp_path / "run.npz"), run([range(3)]))


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 broken"])
def test_load_refuses_other_files(tmp_path, content):
    path = tmp_path / "other.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"path: must be a file written by Selections.save, got .*other.npz"):
        Selections.load(path)


def test_load_refuses_other_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    np.save(tmp_path / "b.npy", np.zeros(3))
    np.savez(tmp_path / "c.npz", header=json.dumps({"format": "2"}), block_ids=np.zeros(1), positions=np.zeros(1))
    for name, message in (("a.npz", "must be a file"), ("b.npy", "must be a file"), ("c.npz", "must hold 'nosa-jax")):
        with pytest.raises(ValueError, match=message):
            Selections.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        Selections.load(tmp_path / "missing.npz")


def npz(path, header, compression=zipfile.ZIP_DEFLATED, **members):
    """A zip of `header` (any JSON) and of members given as bytes or arrays."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in {"header": np.array(json.dumps(header)), **members}.items():
            buffer = io.BytesIO()
            if not isinstance(content, bytes):
                np.lib.format.write_array(buffer, np.asarray(content))
            archive.writestr(f"{name}.npy", content if isinstance(content, bytes) else buffer.getvalue())


def claim(*shape):
    """A .npy header that claims int32 of this shape, and four bytes of it."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<i4", "fortran_order": False, "shape": shape})
    return buffer.getvalue() + bytes(4)


GOOD = {
    "format": "nosa-jax selections 1",
    "attention": dataclasses.asdict(ATTENTION),
    "head_dim": 16,
    "itemsize": 2,
    "label": "nosa",
}
ARRAYS = {"positions": np.arange(3, dtype=np.int32)[None], "block_ids": ids_for([range(3)])}
HOSTILE = {
    "256 TiB of positions": (GOOD, ARRAYS | {"positions": claim(1, 2**46)}),
    "256 TiB of ids": (GOOD, ARRAYS | {"block_ids": claim(2**40, 1, 2, 3, 5)}),
    "a shape below 0": (GOOD, ARRAYS | {"block_ids": claim(-1, 1, 2, 3, 5)}),
    "an overflowing shape": (GOOD, ARRAYS | {"block_ids": claim(2**62, 1, 2**62, 3, 5)}),
    "a bomb": (GOOD, ARRAYS | {"block_ids": np.zeros((2, 1, 2, 2**18, 5), np.int32)}),
    "a long header": (GOOD | {"more": "x" * 2**19}, ARRAYS),
    "another J": (GOOD, ARRAYS | {"block_ids": ids_for([range(3)])[..., :-1]}),
    "a cut header": (GOOD, ARRAYS | {"positions": claim(1, 3)[:40]}),
    "objects": (GOOD, ARRAYS | {"positions": np.array([[None]])}),
    "importance of other layers": (GOOD, ARRAYS | {"importance": np.zeros((3, 1, 2, 4), np.float32)}),
    "importance in another dtype": (GOOD, ARRAYS | {"importance": np.zeros((2, 1, 2, 4), np.int32)}),
    "packed floats": (
        GOOD | {"format": "nosa-jax selections 2"},
        ARRAYS | {"block_ids": ids_for([range(3)]) + np.float32(1.5)},
    ),
    "floats": (GOOD, ARRAYS | {"positions": np.zeros((1, 3))}),
    "no arrays": (GOOD, {}),
    "a list": ([GOOD], ARRAYS),
    "a text": ("nosa-jax selections 1", ARRAYS),
    "null": (None, ARRAYS),
    "deep": (GOOD | {"attention": []}, ARRAYS),
    **{
        f"{name} {value!r}": (GOOD | {name: value}, ARRAYS)
        for name, values in {
            "attention": [None, {}, {"block_size": "4"}, {"unknown": 1}, {"block_size": 10**30}],
            "head_dim": [0, -1, 1.5, "16", None, True, [16]],
            "itemsize": [0, "2", None, {}],
            "label": [1, None, ["nosa"]],
            "format": [1, None, "nosa-jax selections 3", "nosa-jax selections 2"],
        }.items()
        for value in values
        if (name, value) != ("attention", {})
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_before_memory_is_asked_for(tmp_path, name):
    path = tmp_path / "run.npz"
    npz(path, HOSTILE[name][0], **HOSTILE[name][1])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"path: must (be a file written by|hold 'nosa-jax)"):
            Selections.load(path)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


def test_other_compression_is_refused(tmp_path):
    npz(tmp_path / "run.npz", GOOD, zipfile.ZIP_BZIP2, **ARRAYS)
    with pytest.raises(ValueError, match="compressed in another way"):
        Selections.load(tmp_path / "run.npz")
    npz(tmp_path / "run.npz", GOOD, **ARRAYS)
    assert Selections.load(tmp_path / "run.npz").block_ids.shape == (2, 1, 2, 3, 5)


def test_what_needs_more_memory_than_there_is_is_refused(tmp_path, monkeypatch):
    run([range(200)]).save(tmp_path / "run")
    monkeypatch.setattr("nosa_jax.cache.memory.host_limit", lambda: (1000, "for a test"))
    with pytest.raises(ValueError, match="block_ids needs 16000 bytes, more than the 1000 available"):
        Selections.load(tmp_path / "run")


@pytest.mark.parametrize(
    ("ids", "rule"),
    [
        ([0, 2, 1, -1, -1], "must ascend, no id twice"),
        ([0, 1, 1, -1, -1], "must ascend, no id twice"),
        ([0, -1, 1, -1, -1], "must ascend, no id twice"),
        ([-2, 0, 1, -1, -1], "must hold block ids, or -1"),
        ([0, 1, 3, -1, -1], "must not name blocks behind the query"),
        ([0, 1, 2, 2**31 - 1, -1], "must not name blocks behind the query"),
    ],
)
def test_ids_that_no_selection_has_are_refused(tmp_path, ids, rule):
    recorded = run([range(12)])
    wrong = recorded.block_ids.copy()
    wrong[1, 0, 1, 11] = ids
    with pytest.raises(ValueError, match=rf"block_ids: {rule}.*in layer 1, row 0, KV head 1, step 11"):
        dataclasses.replace(recorded, block_ids=wrong)
    npz(tmp_path / "run.npz", GOOD, positions=recorded.positions, block_ids=wrong)
    with pytest.raises(ValueError, match=rf"path: must be .*{rule}"):
        Selections.load(tmp_path / "run.npz")


def test_padded_steps_have_no_ids():
    ids = run([[0, 1, -1]]).block_ids.copy()
    ids[0, 0, 0, 2, 0] = 0
    with pytest.raises(ValueError, match="nor any for a padded step"):
        Selections(ids, np.array([[0, 1, -1]], np.int32), ATTENTION, 16)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run"
    prefill().save(path)

    def full(file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space left"):
        decode().save(path)
    assert_same(Selections.load(path), prefill())
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_home_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    prefill().save("~/run")
    assert_same(Selections.load("~/run"), prefill())
    plots.plot_selection_map(prefill(), path="~/map.png")
    assert (tmp_path / "run").is_file() and (tmp_path / "map.png").is_file()


def test_what_a_notebook_shows():
    recorded = dataclasses.replace(run([range(12)]), label="<b>nosa</b> & co")
    assert repr(recorded) == (
        "Selections('<b>nosa</b> & co': 12 steps of 1 rows, 2 layers, 2 KV heads, 5 blocks of 4 tokens each)"
    )
    report = recorded.report([5])
    assert (
        repr(report).startswith("LocalityReport(<b>nosa</b> & co: 11 steps; 5 blocks of 4 tokens")
        and len(repr(report)) < 200
    )
    shown = report._repr_html_()
    assert "&lt;b&gt;nosa&lt;/b&gt; &amp; co" in shown and "<b>" not in shown
    lines = report.table().splitlines()
    for row in lines[2:8] + lines[12:-1]:
        assert "".join(f"<td>{cell}</td>" for cell in row.split()) in shown
    figure = plots.plot_selection_map(recorded)
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert pickle.loads(pickle.dumps(figure))._repr_png_().startswith(b"\x89PNG")


def test_report_uses_the_block_size_in_bytes():
    report = prefill().concatenate(decode()).report(slots=[5])
    assert report.block_bytes == 2 * 4 * 16 * 2
    assert report.steps == 9 + 10
    assert report.gamma.shape == (2, 2)


@pytest.mark.parametrize(
    "build, error, message",
    [
        (lambda: run([[3, 5, 6]]), ValueError, "positions: must count up one by one"),
        (lambda: run([[-1, 0, 1]]), ValueError, "positions: must count up one by one"),
        (lambda: Selections(np.zeros((1, 1, 1, 2, 3)), np.zeros((1, 2), np.int32), ATTENTION, 16), TypeError, "int32"),
        (
            lambda: Selections(np.zeros((1, 1, 1, 2, 3), np.int32), np.zeros((1, 3), np.int32), ATTENTION, 16),
            ValueError,
            r"positions: must have shape \[B, T\] = \[1, 2\], got \[1, 3\]",
        ),
        (
            lambda: Selections.from_forward(types.SimpleNamespace(block_ids=None), config=CONFIG),
            ValueError,
            "Call with record=True",
        ),
        (
            lambda: Selections.from_forward(types.SimpleNamespace(block_ids=ids_for(PREFILL)), [6, 10], config=CONFIG),
            ValueError,
            "lengths: must be between 0 and T = 9",
        ),
        (
            lambda: Selections.from_generation(
                types.SimpleNamespace(block_ids=ids_for(DECODE), lengths=[5, 3]), [6], config=CONFIG
            ),
            ValueError,
            r"prompt_lengths: must have shape \[B\] = \[2\], got \[1\]",
        ),
        (
            lambda: Selections.from_generation(
                types.SimpleNamespace(block_ids=ids_for(DECODE), lengths=[5, 3]), [6, 0], config=CONFIG
            ),
            ValueError,
            "prompt_lengths: must be >= 1",
        ),
        (lambda: run([[0, 1]]).concatenate(run([[3, 4]])), ValueError, "positions: must count up one by one"),
        (lambda: run([[0, 1]]).concatenate(run(DECODE)), ValueError, "later.block_ids: must have shape"),
        (
            lambda: run([[0, 1]]).concatenate(dataclasses.replace(run([[1, 2]]), head_dim=8)),
            ValueError,
            "later: must have the same head_dim, got 16 and 8",
        ),
    ],
)
def test_errors(build, error, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(error, match=message):
        build()
