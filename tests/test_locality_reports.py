"""Reports put to use: data frames, several texts, costs of pools; importance of tokens; figures of both."""

from __future__ import annotations

import dataclasses
import sys
import types

import jax
import numpy as np
import pytest
from support import lively_model, random_tokens, small_config
from test_selections import CONFIG, run

import nosa_jax
from nosa_jax import locality, plots
from nosa_jax.cache.plan import plan
from nosa_jax.hf import ByteTokenizer
from nosa_jax.locality import selections as recording
from nosa_jax.model import hidden_states

TEXTS = [run([range(first, first + 30)]) for first in (20, 40, 90)]


@pytest.fixture(scope="module")
def reports():
    return [text.report([5, 6]) for text in TEXTS]


# --- Several texts -------------------------------------------------------------------------------------------------


def test_pooled_reports_have_the_mean_and_the_spread_of_each_number(reports):
    pooled = locality.pool(reports)
    assert pooled.mean.steps == 3 * 29 and repr(pooled) == "PooledReports(3 reports of 'nosa', 87 steps)"
    for name, values in pooled.mean.by_head().items():
        of_texts = np.stack([report.by_head()[name] for report in reports])
        np.testing.assert_allclose(values, of_texts.mean(0), err_msg=name)
        np.testing.assert_allclose(pooled.deviation.by_head()[name], of_texts.std(0, ddof=1), err_msg=name)
    # Positions 20 .. 49 and 40 .. 69 share some blocks, 90 .. 119 none.
    at = dict(zip(pooled.mean.positions.tolist(), pooled.mean.gamma_by_position, strict=True))
    assert list(at) == [*range(20, 70, 4), *range(88, 120, 4)]
    of = lambda i, position: dict(zip(reports[i].positions, reports[i].gamma_by_position, strict=True))[position]
    assert at[44] == pytest.approx((of(0, 44) + of(1, 44)) / 2) and at[92] == of(2, 92)
    stored = pooled.to_dict()
    assert stored["reports"] == 3 and stored["deviation"]["gamma_by_position"][-1] is None  # of one text alone


def test_tables_show_spreads(reports):
    gammas = np.array([report.gamma.mean() for report in reports])
    cell = f"{gammas.mean():.3f} ±{gammas.std(ddof=1):.3f}"
    both = locality.comparison_table({"pooled": locality.pool(reports), "first": reports[0]}).splitlines()
    assert both[1].split("gamma")[1].split() == [*cell.split(), f"{gammas[0]:.3f}"]
    assert len({len(line) for line in both}) == 1
    unknown = [dataclasses.replace(report, steps_away=np.full_like(report.gamma, np.nan)) for report in reports]
    (line,) = (line for line in str(locality.pool(unknown)).splitlines() if line.startswith("steps away"))
    assert line.split()[-1] == "-" and "±" not in line  # nothing to measure, and no spread of it
    alone = str(locality.pool(reports[:1]))
    assert "±" not in alone and alone == locality.comparison_table({"nosa": reports[0]})
    assert locality.pool(reports)._repr_html_().startswith("<pre>")
    assert "miss, min" not in str(TEXTS[0].report([], windows=[]))  # no slots, no table of transfers


def test_other_reports_are_not_pooled(reports):
    with pytest.raises(ValueError, match="reports: must be of one attention and shape, with the same slots"):
        locality.pool([*reports, TEXTS[0].report([5])])
    with pytest.raises(ValueError, match="reports: must hold at least one"):
        locality.pool([])


# --- Data frames ---------------------------------------------------------------------------------------------------


def test_a_data_frame_has_a_row_per_layer_and_head(reports, monkeypatch):
    pandas = types.ModuleType("pandas")
    pandas.DataFrame = dict
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    frame = reports[0].to_dataframe()
    assert frame["label"] == ["nosa"] * 4
    assert frame["layer"].tolist() == [0, 0, 1, 1] and frame["head"].tolist() == [0, 1, 0, 1]
    names = ["gamma", "new_blocks", "steps_away", "dense_share", "working_set@16", "misses@5", "optimal_misses@6"]
    assert set(names) < set(frame) and {len(column) for column in frame.values()} == {4}
    assert frame["misses@5"].tolist() == reports[0].misses[5].reshape(-1).tolist()


def test_missing_pandas_is_named(reports, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r'pandas is needed for data frames: pip install "nosa-jax\[pandas\]"'):
        reports[0].to_dataframe()


# --- Costs ---------------------------------------------------------------------------------------------------------


def test_costs_are_those_of_a_plan_at_the_measured_misses(reports):
    rates = {"link_bytes_per_second": 1e9, "hbm_bytes_per_second": 1e11}
    report = reports[2]
    costs = locality.pool_costs(report, CONFIG, batch=3, max_length=400, **rates)
    assert list(costs) == [5, 6]
    missed = report.misses[6].mean()
    cache = nosa_jax.CacheConfig(slots=6)
    assert costs[6] == plan(CONFIG, 3, 400, cache, misses=float(missed), **rates)
    # 4 tables per row; a block of 4 tokens, K and V, 16 numbers of 2 bytes; one written back every 4 steps.
    assert costs[6].pcie_bytes_per_token == pytest.approx(4 * (missed + 1 / 4) * 2 * 4 * 16 * 2)
    best = locality.pool_costs(report, CONFIG, batch=3, max_length=400, policy="belady", **rates)
    assert best[6].misses_per_step == report.optimal_misses[6].mean() < missed
    lines = locality.cost_table({"nosa": costs, "at best": best}).splitlines()
    assert lines[0].split()[:2] == ["slots", "pool,"] and len(lines) == 5 and len({len(line) for line in lines}) == 1
    assert lines[2].split()[:2] == ["nosa", "6"] and lines[2].split()[3] == f"{missed:.2f}"


def test_pools_are_checked_before_anything_runs(monkeypatch, without_type_checker):
    monkeypatch.setattr("nosa_jax.locality.report.gamma", None)
    with pytest.raises(TypeError, match=r"^slots: must be a sequence of pool sizes, got 8\. Pass \(5,\)"):
        TEXTS[0].report(slots=8)
    for wrong in ([3], [8, -1]):
        with pytest.raises(ValueError, match=r"^slots: must be ints >= J = 5, as a selection must fit, got"):
            TEXTS[0].report(slots=wrong)


def test_costs_need_the_attention_and_the_optimum_that_were_measured(reports):
    with pytest.raises(ValueError, match="config: must have the attention that the report measured"):
        locality.pool_costs(reports[0], CONFIG.with_attention(variant="dma"), batch=1, max_length=99)
    with pytest.raises(ValueError, match="report: must have the misses of the offline optimum"):
        bare = TEXTS[0].report([5], belady=False)
        locality.pool_costs(bare, CONFIG, batch=1, max_length=99, policy="belady")


# --- Importance ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_importance_is_what_the_layers_compute():
    model = lively_model(small_config())
    tokens, lengths = random_tokens(2, 40), np.array([40, 23])
    kept = locality.token_importance(model, tokens, lengths)
    record = lambda layer: layer.importance
    whole = jax.jit(lambda model, tokens: hidden_states(model, tokens, None, None, record=record)[1])(model, tokens)
    assert kept.shape == (2, 2, 2, 40) and kept.dtype == np.float32
    np.testing.assert_allclose(kept[:, 0], whole[:, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(kept[:, 1, :, :23], whole[:, 1, :, :23], rtol=1e-5, atol=1e-6)
    assert np.isnan(kept[:, 1, :, 23:]).all()
    with pytest.raises(ValueError, match="model: must have importance, as `nosa` and `dma` do, got 'infllmv2'"):
        locality.token_importance(nosa_jax.with_attention(model, variant="infllmv2"), tokens)


def test_a_recording_keeps_the_importance_of_what_was_read(monkeypatch):
    model = lively_model(small_config())
    config, seen = model.config, []
    ids = np.broadcast_to(np.array([0, *[-1] * 7], np.int32), (2, 1, 2, 3, 8))
    made = nosa_jax.Generation(tokens=np.array([[7, 8, 9]], np.int32), lengths=np.asarray([3]), block_ids=ids)
    monkeypatch.setattr(recording, "generate", lambda *_, **__: made)

    def importance(model, tokens, chunk):
        seen.append((tokens.tolist(), chunk))
        return np.zeros((config.num_layers, 1, config.num_kv_heads, tokens.shape[1]), np.float32)

    monkeypatch.setattr(recording, "token_importance", importance)
    recorded = locality.record(model, np.arange(5, dtype=np.int32), 3, chunk=4, importance=True, label="mine")
    # 9 was drawn last and never read.
    assert seen == [([[0, 1, 2, 3, 4, 7, 8]], 4)] and recorded.importance.shape == (2, 1, 2, 7)
    assert recorded.positions.tolist() == [[4, 5, 6]] and recorded.label == "mine"


IMPORTANCE = np.array([[[0, 4, 0, 4, 2, np.nan], [5, 5, 5, 5, 5, np.nan]]], np.float32)  # of one layer and two heads
TEXT = np.frombuffer(b"a$ $ba", np.uint8).astype(np.int32)


def test_tokens_that_matter_most():
    found = locality.top_tokens(IMPORTANCE, TEXT, ByteTokenizer())
    # On the scale of the first head, 2 ± 1.79; the second one has no opinion. The last token was not recorded.
    assert [one[:3] for one in found] == [(36, "$", 2), (98, "b", 1), (32, "␣", 1), (97, "a", 1)]
    high = 2 / np.sqrt(3.2) / 2
    np.testing.assert_allclose([one.importance for one in found], [high, 0, -high, -high], atol=1e-12)
    assert [one.text for one in locality.top_tokens(IMPORTANCE, TEXT, count=1)] == ["<36>"]
    assert [one.text for one in locality.top_tokens(IMPORTANCE, TEXT, ByteTokenizer(), least=2)] == ["$"]


# --- Figures -------------------------------------------------------------------------------------------------------


def test_importance_figures(tmp_path):
    figure = plots.plot_importance(IMPORTANCE)
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), IMPORTANCE[0, 0])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["KV head 0", "KV head 1"]
    figure = plots.plot_top_tokens(IMPORTANCE, TEXT, ByteTokenizer(), count=2, path=tmp_path / "tokens.svg")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["$  ×2", "b  ×1"]
    assert not any(label.get_parse_math() for label in figure.axes[0].get_yticklabels())  # $ is no formula
    assert (tmp_path / "tokens.svg").read_bytes().startswith(b"<?xml")
    with pytest.raises(ValueError, match=r"layers: must be in 0 .. 0, got 1"):
        plots.plot_importance(IMPORTANCE, layers=[1])


def test_heat_maps_show_the_share_of_heads():
    recorded = TEXTS[0]
    shares = locality.selection_shares(recorded, layer=1)
    own = recorded.positions[0] // 4
    for step, block in np.ndindex(shares.shape):
        if block > own[step]:
            assert np.isnan(shares[step, block])
        else:
            assert shares[step, block] == (recorded.block_ids[1, 0, :, step] == block).any(-1).mean()
    figure = plots.plot_heatmaps(recorded)
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == ["layer 0", "layer 1"]
    np.testing.assert_array_equal(figure.axes[1].images[0].get_array(), np.ma.masked_invalid(shares.T))

    other = dataclasses.replace(recorded, block_ids=recorded.block_ids[::-1].copy(), label="other")
    drawn = plots.plot_difference(recorded, other, layer=1).axes[0].images[0].get_array()
    expected = locality.selection_shares(other, layer=1) - shares
    np.testing.assert_array_equal(drawn.filled(np.nan), expected.T)
    assert np.nanmax(np.abs(expected)) > 0
    with pytest.raises(ValueError, match="other: must have the positions of the first"):
        plots.plot_difference(recorded, TEXTS[1])
    with pytest.raises(ValueError, match=r"layer: must be in 0 .. 1, got 2"):
        plots.plot_difference(recorded, other, layer=2)


@pytest.mark.slow
def test_everything_is_drawn_on_request(tmp_path, reports):
    other = dataclasses.replace(TEXTS[0], label="other")
    files = locality.draw(
        {"nosa": TEXTS[0], "other": other}, {"nosa": reports[0], "other": reports[0]}, tmp_path, heatmaps=True
    )
    names = ["locality", "selections-nosa", "heatmap-nosa", "selections-other", "heatmap-other", "difference-other"]
    assert [file.name for file in files] == [f"{name}.png" for name in names] and all(file.is_file() for file in files)
