"""The benchmark: what it counts, what it compares, what it says of what cannot run, and what tuning keeps."""

from __future__ import annotations

import functools
import json
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import OPS, _backend, _tuning
from pallas_kernels._tuning import Launch
from pallas_kernels.bench import __main__ as cli
from pallas_kernels.bench import compare, counts, peers, report, timing, tune, work
from pallas_kernels.bench.counts import Floor

BF16 = jnp.bfloat16


def last_line(text):
    return json.loads(text.strip().splitlines()[-1])


# ---- floors ----


def tiny_attention(**changes):
    """2 heads of 8 on one KV head; 10 tokens in blocks of 4; the last query is padding."""
    ids = jnp.array([[[[0, 2, -1], [1, 0, 3], [0, 1, 2]]]], jnp.int32)
    q, k = jnp.ones((1, 3, 2, 8), BF16), jnp.ones((1, 1, 10, 8), BF16)
    positions = jnp.array([[9, 5, -1]], jnp.int32)
    arrays = {"q": q, "k": k, "v": k, "bias": jnp.ones((1, 1, 10))}
    return arrays | {"block_ids": ids, "positions": positions, "first_block": None} | changes


def test_floor_of_attention():
    # Query 9 sees 4 tokens of block 0 and 8, 9 of block 2; query 5 sees 4, 5 of block 1 and 4 of block 0.
    forward = counts.attention(tiny_attention(), block_size=4, gradient=False)
    inputs = 2 * 48 + 2 * (2 * 80) + 4 * 10 + 4 * 9 + 4 * 3
    assert forward == Floor(inputs + 2 * 48 + 4 * 6, 4 * 2 * 8 * 12, "bfloat16")
    both = counts.attention(tiny_attention(), block_size=4, gradient=True)
    assert both.flops == 3.5 * forward.flops
    # dout in; gradients of q, k, v and bias out.
    assert both.bytes == forward.bytes + 2 * 48 + (2 * 48 + 2 * (2 * 80) + 4 * 10)


def test_floor_of_dense_and_packed_attention():
    flops = lambda **changes: counts.attention(tiny_attention(**changes), block_size=4, gradient=False).flops / 64
    assert flops(block_ids=None) == 10 + 6
    # The document of blocks 1 and 2 starts at token 4: query 9 loses block 0, query 5 as well.
    packed = jnp.array([[0, 1, 1]], jnp.int32)
    assert flops(first_block=packed) == 2 + 2
    assert flops(first_block=packed, block_ids=None) == 6 + 2
    shapes = {"q": (1, 3, 2, 8), "k": (1, 2, 3, 8), "v": (1, 2, 3, 8)}
    dense = counts.dense_attention({name: jnp.ones(shape, BF16) for name, shape in shapes.items()}, gradient=False)
    assert dense == Floor(4 * 2 * 48, 4 * 2 * 8 * (1 + 2 + 3), "bfloat16")


def test_visible_windows():
    # stride 2: windows end at 3, 5, 7, 9; a document that starts at token 4 has those from window 2 on.
    positions = jnp.array([[-1, 2, 3, 8, 9]], jnp.int32)
    seen = functools.partial(counts.visible_windows, positions, windows=4, block_size=4, stride=2)
    assert seen(None) == 0 + 0 + 1 + 3 + 4
    assert seen(jnp.array([[0, 1, 1]], jnp.int32)) == 0 + 0 + 1 + 1 + 2


def test_floors_of_decoding_and_transport():
    ids, slots = jnp.array([[[0, 2, -1]]], jnp.int32), jnp.array([[[1, 0, -1]]], jnp.int32)
    pool = jnp.ones((2, 1, 1, 2, 2, 4, 8), BF16)
    arrays = {"q": jnp.ones((1, 2, 8), BF16), "pool": pool, "bias": jnp.ones((2, 1, 1, 3, 4))}
    floor = counts.decode_attention(arrays | {"block_ids": ids, "slots": slots, "positions": jnp.array([9], jnp.int32)})
    assert floor == Floor(2 * (2 * 16) + 4 * (3 + 3 + 1) + 6 * (2 * 8 * 2 + 4), 4 * 2 * 8 * 6, "bfloat16")
    pages = jnp.zeros((1, 2), jnp.int32)  # block 2 has none
    moved = counts.moved_blocks({"pool": pool, "page_table": pages, "block_ids": ids, "slots": slots})
    assert moved == Floor(2 * 4 * 8 * 2 + 4 * 6, link_bytes=2 * 4 * 8 * 2)


def test_rooflines():
    seconds = functools.partial(counts.roofline_seconds, device="nvidia_h200")
    assert seconds(Floor(4_300_000, 1000, "bfloat16")) == pytest.approx(1e-6)
    assert seconds(Floor(1, 790_000_000, "bfloat16")) == pytest.approx(1e-6)
    assert seconds(Floor(1, 60_000_000)) == pytest.approx(1e-6)
    assert seconds(Floor(1, link_bytes=53_000)) == pytest.approx(1e-6)
    assert counts.roofline_seconds(Floor(1), "cpu") is None


# ---- timing ----


def test_short_calls_are_timed_together():
    asked = []

    def sample(calls):
        asked.append(calls)
        return 1e-4 + 1e-5 * calls  # waiting costs as much as ten calls

    median, least, most, calls = timing.measure(sample, 3)
    assert calls * 1e-5 + 1e-4 >= timing.SAMPLE_SECONDS and asked[-3:] == [calls] * 3
    assert 0.01 <= least == median == most < 0.0103  # milliseconds


def test_long_calls_are_timed_alone():
    assert timing.measure(lambda calls: 0.02 * calls, 2) == (20, 20, 20, 1)


def test_copies():
    mebibyte = np.zeros((2**18,), np.float32)
    assert timing.num_copies({"x": mebibyte}, 200 * 2**20) == 1
    assert timing.num_copies({"x": mebibyte}, 40 * 2**20) == 3
    assert timing.num_copies({"x": mebibyte}, 0) == 16
    inputs = {"x": jnp.arange(4.0), "host": jax.device_put(jnp.arange(4.0), jax.memory.Space.Host), "none": None}
    first, second = timing.copies(inputs, 2)
    assert first["host"].sharding.memory_kind == "pinned_host" and first["none"] is None
    jax.jit(lambda x: x + 1, donate_argnums=0)(first["x"])
    assert first["x"].is_deleted() and second["x"].sum() == inputs["x"].sum() == 6


def test_updates_are_handed_on():
    sets = [{"x": jnp.asarray(0), "n": jnp.asarray(1)}, {"x": jnp.asarray(10), "n": jnp.asarray(1)}]
    sample = timing.sampler(jax.jit(lambda x, n: x + n, donate_argnames="x"), sets, ("x",))
    sample(5)
    assert [int(one["x"]) for one in sets] == [0 + 4, 10 + 4]  # 3 calls of warm-up


# ---- comparing ----


def test_errors():
    truth = {"a": np.array([4.0, -np.inf, 2.0]), "b": np.array([1.0])}
    error = lambda *a: compare.error({"a": np.array(a)}, truth)
    assert error(4, -np.inf, 1) == 0.25
    assert error(4, 0, 2) == math.inf and math.isnan(error(4, -np.inf, np.nan))
    assert compare.error({"a": truth["a"], "b": np.array([1.5])}, truth) == 0.5
    assert compare.error({"ids": np.array([1, 2, -1])}, {"ids": np.array([1, 3, 2])}) == 2
    with pytest.raises(ValueError, match=r"^b: the output has shape \[2\], the reference \[1\]"):
        compare.error({"b": np.zeros(2)}, truth)


@pytest.mark.parametrize("op", ["block_attention", "block_attention_grad", "block_scores", "select_blocks"])
def test_a_sample_of_the_queries_says_the_same(op, monkeypatch):
    monkeypatch.setattr(work, "_logits_bytes", lambda: 0)
    monkeypatch.setattr(work, "_REFERENCE_QUERIES", 5)
    case = "k2_g8_chunk"
    sampled = work.BENCHMARKS[op].work(work.BENCHMARKS[op].cases[case])
    assert sampled.compared == ("5 of 33 queries" if op == "select_blocks" else "1 of 33 queries")
    inputs = sampled.checked or sampled.inputs
    output = jax.jit(functools.partial(sampled.call, implementation="xla"))(**inputs)
    assert compare.error(sampled.comparable(output), sampled.expected) < 1e-5


# What moves or compares numbers gives those of its reference; what computes has a bound.
EXACT = ("select_blocks", "resolve_slots", "fetch_blocks", "write_back_blocks")


def slightly_wrong(x):
    """The array with its largest finite number off by 1 for integers, by a thousandth for floats."""
    x = np.array(x)
    if x.dtype == bool:
        x.flat[0] = not x.flat[0]
        return x
    magnitude = np.where(np.isfinite(x), np.abs(x.astype(np.float64)), -1)
    at = np.unravel_index(np.argmax(magnitude), x.shape)
    x[at] = x[at] + 1 if x.dtype.kind in "iu" else x[at] * x.dtype.type(1.001)
    return x


@pytest.mark.parametrize("op", work.BENCHMARKS)
def test_every_op_is_timed_and_compared(op, monkeypatch):
    """And what it is compared with would show a mistake: each array of the output, a little wrong, is out of bounds."""
    compared, real = [], compare.error
    monkeypatch.setattr(compare, "error", lambda ours, truth: compared.append((ours, truth)) or real(ours, truth))
    benchmark = work.BENCHMARKS[op]
    case = next(iter(benchmark.source.SMALL.values()))
    entry = report.shapes(benchmark.work(case).inputs) | cli.time_work(benchmark.work(case), "xla", 1)
    assert entry["shapes"] and entry["ms"]["median"] > 0
    bound = 0 if op in EXACT else 1e-5
    assert entry["error"] <= bound
    ((ours, truth),) = compared
    assert ours.keys() == truth.keys()
    for name, array in ours.items():
        assert real(ours | {name: slightly_wrong(array)}, truth) > bound, name


# ---- the command ----


def test_a_run(capsys, tmp_path):
    file = tmp_path / "results" / "bench.json"
    ops, cases = ["append_pooled_keys", "block_attention*"], ["k1_g4_short", "one_head"]
    assert cli.main(["--ops", *ops, "--cases", *cases, "--repeats", "2", "--json", str(file)]) == 0
    printed = capsys.readouterr()
    result = last_line(printed.out)
    assert json.loads(file.read_text()) == result
    assert {"device", "jax", "jaxlib", "commit", "date", "timing"} <= set(result["environment"])
    entries = {(e["op"], e["implementation"]): e for e in result["entries"]}
    ran = [entries[op, "xla"] for op in ("append_pooled_keys", "block_attention", "block_attention_grad")]
    assert [e["status"] for e in ran] == ["ok"] * 3 and all(e["error"] < 1e-5 for e in ran)
    assert all(0 < e["ms"]["min"] <= e["ms"]["median"] <= e["ms"]["max"] for e in ran)
    assert ran[1]["shapes"]["q"] == [1, 63, 4, 128] and ran[1]["dtype"] == "float32" and ran[1]["share"] is None
    # The others need a GPU: one line each, in the table, on stderr and in the JSON.
    for name in ("triton", *peers.NAMES):
        entry = entries["block_attention", name]
        assert entry["status"] == "unsupported" and "GPU" in entry["reason"] and entry["case"] == "-"
        for text in (printed.out, printed.err):
            assert any(name in line and entry["reason"] in line for line in text.splitlines())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ops", "fetch_*", "atention"], r"--ops: no match for 'atention'. Valid: pool_keys, .*write_back_blocks"),
        (["--ops", "fetch_blocks", "--cases", "k1_g1"], r"--cases: no match for 'k1_g1'. Valid: one_head, .*8b_step"),
        (["--implementations", "cuda"], "--implementations: no match for 'cuda'. Valid: cudnn, mosaic, triton, xla"),
        (["--repeats", "0"], "--repeats: must be at least 1, got 0"),
    ],
)
def test_unknown_names_stop_before_any_work(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(cli, "bench", None)
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_list_names_everything(capsys):
    assert cli.main(["--list"]) == 0
    text = capsys.readouterr().out
    for name, benchmark in work.BENCHMARKS.items():
        assert f"\n{name}  (" in f"\n{text}" and all(case in text for case in benchmark.cases)


def test_ops_that_share_inputs_are_neighbours():
    items = cli.plan(["fetch_blocks", "write_back_blocks"], ["one_head", "all"])
    both = ["fetch_blocks", "write_back_blocks"]
    assert items == [(op, case) for case in ("one_head", "all") for op in both]


def test_an_unsupported_case_is_a_line(monkeypatch):
    monkeypatch.setitem(OPS["block_attention"].unsupported, "triton", lambda *args: "it takes no such case")
    with _backend.interpreted():
        (entry,) = cli.bench([cli.Item("block_attention", "dense_packed")], ["triton"], 1, with_peers=False)
    assert (entry["status"], entry["case"]) == ("unsupported", "dense_packed")
    assert "it takes no such case" in entry["reason"]


def test_a_crash_is_a_line_and_the_rest_goes_on(monkeypatch, capsys):
    def crash(**_):
        raise RuntimeError("out of memory\nwhile trying")

    real = work.BENCHMARKS["pool_keys"]
    build = lambda case, keys: work.Work({"keys": keys}, crash, Floor(1))
    monkeypatch.setitem(work.BENCHMARKS, "pool_keys", work.Benchmark(real.op, real.source, build))
    assert cli.main(["--ops", "*pool*", "--cases", "one_head", "--repeats", "1"]) == 1
    entries = last_line(capsys.readouterr().out)["entries"]
    first, second = (entry for entry in entries if entry["status"] != "unsupported")
    assert (first["status"], first["reason"]) == ("failed", "RuntimeError: out of memory")
    assert (second["op"], second["status"]) == ("append_pooled_keys", "ok")


def test_peers_refuse_other_masks():
    packed, dense = (tiny_attention(first_block=x, block_ids=None) for x in (jnp.zeros((1, 3), jnp.int32), None))
    with pytest.raises(NotImplementedError, match="whole rows"):
        peers.cudnn(packed, gradient=False)
    with pytest.raises(NotImplementedError, match="whole rows"):
        peers.cudnn(dense, gradient=False)  # its queries are neither all nor the last tokens
    behind = dense | {"positions": jnp.array([[7, 8, 9]], jnp.int32)}
    assert peers.cudnn(behind, gradient=False).floor.flops == 4 * 2 * 8 * (8 + 9 + 10)
    whole = dense | {"q": jnp.ones((1, 10, 2, 8), BF16), "positions": jnp.arange(10, dtype=jnp.int32)[None]}
    assert peers.cudnn(whole, gradient=True).inputs["k"].shape == (1, 10, 1, 8)
    with pytest.raises(NotImplementedError, match="block ids"):
        peers.fla_nsa(whole, block_size=4, gradient=False, copies=1)


# ---- tuning ----


def test_merging_keeps_other_entries(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "PACKAGED", tmp_path / "packaged")
    entry = lambda dim, ms: {"match": {"dim": dim}, "launch": {"rows": 64, "num_warps": 4, "num_stages": 2}, "ms": ms}
    for kernel, new in [("a", entry(64, 1)), ("b", entry(64, 2)), ("a", entry(128, 3))]:
        tune.write(tmp_path / "packaged", "gpu", kernel, new)
    file = tune.write(tmp_path / "own", "gpu", "a", entry(64, 4))
    table = json.loads(file.read_text())
    assert table["device"] == "gpu" and table["jax"] == jax.__version__
    assert table["kernels"] == {"a": [entry(128, 3), entry(64, 4)], "b": [entry(64, 2)]}


def test_neighbours_are_valid_and_start_with_the_launch_itself():
    current = Launch(64, 4, 3)
    for kernel, count in (("block_attention_forward", 6), ("block_attention_forward_dense", 8), ("block_scores", 8)):
        launches = tune.neighbours(kernel, current)
        assert launches[0] == current and len(set(launches)) == len(launches) == count
        assert all(_tuning.checked(**launch._asdict()) == launch for launch in launches)


@pytest.mark.slow
def test_tuning_finds_the_fastest_launch(tmp_path, monkeypatch):
    """With a stand-in for the clock that likes two stages and cannot run eight warps."""

    def traced(kernel, launch, work):
        assert f"num_warps={launch.num_warps}" in str(plain(kernel, launch, work).jaxpr)
        return SimpleNamespace(lower=lambda: SimpleNamespace(compile=lambda: launch))

    def milliseconds(work, launch, repeats):
        if launch.num_warps == 8:
            raise RuntimeError("out of shared memory")
        return abs(launch.num_stages - 2) + abs(launch.rows - 16) / 1000

    plain = tune._traced
    monkeypatch.setattr(tune, "_traced", traced)
    monkeypatch.setattr(cli, "_milliseconds", milliseconds)
    items = [cli.Item("block_attention", case) for case in ("k1_g4_short", "dense_packed")]
    with _backend.interpreted():
        result, of_dense = cli.tune_kernels(items, 1, tmp_path)
    assert (of_dense["kernel"], of_dense["case"]) == ("block_attention_forward_dense", "dense_packed")
    assert result["launch"] == {"rows": 16, "num_warps": 4, "num_stages": 2, "keys": 64}
    assert result["match"] == {"dim": 128, "group": 4, "dtype": "float32", "block_size": 16}
    assert result["case"] == "k1_g4_short" and result["ms"] == 0
    assert [c["ms"] is None for c in result["candidates"]] == [c["num_warps"] == 8 for c in result["candidates"]]
    (entry,) = json.loads((tmp_path / f"{_tuning.device_kind()}.json").read_text())["kernels"][
        "block_attention_forward"
    ]
    assert entry["launch"] == result["launch"]
    assert "num_warps" not in cli.tuned_table([result]).splitlines()[1]
