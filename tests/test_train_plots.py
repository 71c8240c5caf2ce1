"""A run's log as a figure and as a few lines of text: what is in them, and what is left out."""

import json
import math
import sys

import matplotlib
import pytest

from nosa_jax.train import plot_run, summary


def step(number, loss, **more):
    fields = {"loss": loss, "grad_norm": 2.0 / number, "learning_rate": 1e-3, "tokens_per_second": 1000.0 * number}
    return {"kind": "train", "step": number, **fields, **more}


def evaluation(number, loss, **more):
    return {"kind": "eval", "step": number, "loss": loss, "bits_per_byte": loss, "tokens": 10, **more}


def measured(number, loss, scale):
    return evaluation(
        number,
        loss,
        loss_by_position={"0": loss + scale, "64": loss, "128": loss - scale},
        gamma=1 - scale / 10,
        misses={"8": scale, "10": scale / 2},
        bias_by_layer=[0.0, scale],
    )


START = {"kind": "start", "step": 0, "config": {}, "directory": "runs/tiny"}
RUN = [
    START,
    step(1, 5.0),
    step(2, 4.5),
    measured(2, 4.6, 0.3),
    step(3, 4.25),
    measured(3, 4.2, 0.2),
    step(4, 4.0),
    measured(4, 4.4, 0.1),
]


def panels(figure):
    """Of each panel its title, and its curves as name and points."""
    points = lambda line: list(zip(*line.get_data(), strict=True))
    return {
        axes.get_title(loc="left"): {line.get_label(): points(line) for line in axes.lines}
        for axes in figure.axes
        if axes.get_title(loc="left")
    }


def test_the_figure_shows_what_the_log_holds(tmp_path):
    settings = dict(matplotlib.rcParams)
    figure = plot_run(RUN, tmp_path / "training.png")
    assert dict(matplotlib.rcParams) == settings
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    found = panels(figure)
    assert list(found) == [
        "Loss",
        "Held-out loss along the row",
        "Gradient norm and learning rate",
        "Reuse of blocks",
        "Transfers by size of the device pool",
        "Size of the bias by layer",
    ]
    assert found["Loss"] == {
        "training, before each step": [(1, 5.0), (2, 4.5), (3, 4.25), (4, 4.0)],
        "held out": [(2, 4.6), (3, 4.2), (4, 4.4)],
    }
    along = found["Held-out loss along the row"]
    assert list(along) == ["after step 2", "after step 4"] and along["after step 4"][2] == (128, pytest.approx(4.3))
    assert found["Transfers by size of the device pool"]["10 slots"] == [(2, 0.15), (3, 0.1), (4, 0.05)]
    assert found["Size of the bias by layer"] == {
        "after step 2": [(0, 0.0), (1, 0.3)],
        "after step 4": [(0, 0), (1, 0.1)],
    }
    norm, rate = (
        next(axes for axes in figure.axes if axes.get_ylabel().startswith(y)) for y in ("gradient", "learning")
    )
    assert norm.get_yscale() == "log" and [tuple(point) for point in norm.lines[0].get_xydata()][3] == (4, 0.5)
    assert set(rate.lines[0].get_ydata()) == {1e-3} and rate.get_ylim()[0] == 0
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes if axes is not rate)


def test_missing_parts_are_left_out(tmp_path):
    dense = [START, step(1, 5.0), evaluation(1, 5.0, gamma=None, misses={}, bias_by_layer=[])]
    assert list(panels(plot_run(dense))) == ["Loss", "Gradient norm and learning rate"]
    without_rate = [{"kind": "train", "step": 1, "loss": 2.0, "grad_norm": 0.0}]  # an optimizer of the user's own
    figure = plot_run(without_rate)
    assert list(panels(figure)) == ["Loss", "Gradient norm"] and figure.axes[1].get_yscale() == "linear"
    figure = plot_run([measured(7, 3.0, 0.5)])
    assert list(panels(figure)["Size of the bias by layer"]) == ["after step 7"]
    assert len(figure.axes) == 5  # the sixth place is empty
    unknown = {**evaluation(7, None), "loss_by_position": {"0": None, "64": 2.0}, "bias_by_layer": [None, 1.0]}
    found = panels(plot_run([step(1, None), step(2, 5.0), unknown]))  # of steps that were not finite
    assert found["Loss"] == {"training, before each step": [(2, 5.0)]}
    assert found["Held-out loss along the row"]["after step 7"][1] == (64, 2.0)
    with pytest.raises(ValueError, match="log: must hold records of steps or evaluations, got none"):
        plot_run([START])


def test_a_log_a_folder_and_records_are_the_same(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(record) + "\n" for record in RUN))
    assert panels(plot_run(log)) == panels(plot_run(str(tmp_path))) == panels(plot_run(RUN))
    assert summary(log) == summary(tmp_path) == summary(RUN)


def test_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'matplotlib is needed for figures: pip install "nosa-jax\[plots\]"'):
        plot_run(RUN)


def test_the_summary_says_the_best_and_the_last():
    assert summary(RUN).split("\n") == [
        "best held-out loss 4.2000 nats per token after step 3, 4.4000 after step 4",
        "training loss 4.0000 in step 4",
        "median 3,000 tokens/s",  # of 2,000, 3,000 and 4,000: the first step compiles
        "files in runs/tiny",
    ]


def test_the_summary_of_little():
    assert summary([]) == "" and summary([{**START, "directory": None}]) == ""
    lines = summary([START, step(1, 5.0, mfu=0.5, skipped=1), evaluation(1, 4.0)]).split("\n")
    assert lines == [
        "best held-out loss 4.0000 nats per token after step 1",
        "training loss 5.0000 in step 1",
        "median 1,000 tokens/s, MFU 50%",
        "1 step skipped, whose loss or gradients were not finite",
        "files in runs/tiny",
    ]
    for nan in (math.nan, None):  # of a run, and as its log has it
        broken = summary([evaluation(1, nan), evaluation(2, 3.0), evaluation(3, nan), step(4, nan)])
        assert "held-out loss 3.0000 nats per token after step 2, nan after step 3\ntraining loss nan in" in broken
    assert "2,000 steps skipped" in summary([step(1, 5.0, skipped=2000)])
