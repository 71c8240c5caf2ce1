"""Figures of recorded selections: what they show, and the files that they are written to."""

import sys

import matplotlib
import numpy as np
import pytest
from test_selections import run

from nosa_jax import plots


def test_comparison_figure(tmp_path):
    reports = {"nosa": run([range(16, 27)] * 2).report([5]), "early": run([range(11)] * 2).report([5, 8])}
    settings = dict(matplotlib.rcParams)
    figure = plots.plot_comparison(reports, tmp_path / "comparison.png")
    assert dict(matplotlib.rcParams) == settings
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    by_layer, by_slots, by_position = figure.axes[:3]
    assert [axes.get_title(loc="left") for axes in figure.axes[:3]] == [
        "Reuse by layer",
        "Transfers by size of the device pool",
        "Reuse along the text",
    ]
    np.testing.assert_allclose(by_layer.lines[0].get_ydata(), reports["nosa"].gamma.mean(1))
    np.testing.assert_array_equal(by_slots.lines[2].get_xdata(), [5, 8])
    np.testing.assert_array_equal(
        by_slots.lines[3].get_ydata(), [x.mean() for x in reports["early"].optimal_misses.values()]
    )
    np.testing.assert_array_equal(by_position.lines[1].get_xdata(), range(0, 11, 4))
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["nosa", "early", r"guaranteed $\gamma$", "offline optimum"]
    with pytest.raises(ValueError, match="reports: must hold at least one"):
        plots.plot_comparison({})


@pytest.mark.parametrize(
    ("name", "written", "start"),
    [
        ("figure", "figure.png", b"\x89PNG"),
        ("figure.", "figure.png", b"\x89PNG"),
        ("figure.svg", "figure.svg", b"<?xml"),
        ("a.b.pdf", "a.b.pdf", b"%PDF"),
    ],
)
def test_the_ending_sets_the_format_of_a_figure(tmp_path, name, written, start):
    plots.plot_comparison({"nosa": run([range(16, 27)]).report([5])}, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [written]
    assert (tmp_path / written).read_bytes().startswith(start)


def test_selection_map(tmp_path):
    recorded = run([[7, 8, 9, 10, 11, 12]])
    ids = np.array([[0, 1], [0, 1], [0, 1], [0, 2], [1, 2], [0, 2]], np.int32)
    ids = np.concatenate([ids, np.full((6, 3), -1, np.int32)], axis=1)
    ids[-1] = [0, 2, 3, -1, -1]
    recorded.block_ids[1, 0, 1] = ids
    figure = plots.plot_selection_map(recorded, layer=1, head=1, path=tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    # Rows are blocks 0 .. 3. 0: not selected, 1: sink or local, 2: kept, 3: new, 4: not yet written.
    np.testing.assert_array_equal(
        figure.axes[0].images[0].get_array(),
        [
            [1, 1, 1, 1, 0, 3],
            [1, 1, 1, 0, 3, 0],
            [4, 0, 0, 3, 1, 1],
            [4, 4, 4, 4, 4, 3],
        ],
    )
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["not selected", "sink and local", "new at this step", "not yet written"]


def test_selection_map_errors():
    with pytest.raises(ValueError, match=r"head: must be in 0 .. 1, got 2"):
        plots.plot_selection_map(run([[0, 1]]), head=2)
    with pytest.raises(ValueError, match="row: must have at least one step"):
        plots.plot_selection_map(run([[0, 1], [-1, -1]]), row=1)


def test_missing_matplotlib_is_named(monkeypatch):
    selections = run([[0, 1]])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'matplotlib is needed for figures: pip install "nosa-jax\[plots\]"'):
        plots.plot_selection_map(selections)
