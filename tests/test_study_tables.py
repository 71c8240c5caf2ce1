"""Tables of the study from a made-up folder of results."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments.study import figures, tables


def losses(mean, by_document=(0.0, 0.0, 0.0)):
    """Of three documents in 16 parts; the last four parts lose 1 more."""
    return (mean + np.array(by_document)[:, None] + (np.arange(16) >= 12)).tolist()


def result(name, seed, mean, gamma=None, before=True, **more):
    after = {"losses": losses(mean)}
    if gamma is not None:
        pools = {"8": 4 * (1 - gamma), "10": 1 - gamma}
        after["locality"] = {"gamma": gamma, "misses": pools, "bytes_per_token": {"8": 4e6, "10": 1e6}}
        after["locality after 32"] = {"gamma": 1.0, "misses": {"8": 0.5}}
    found = {
        "arm": name,
        "seed": seed,
        "attention": {"variant": name},
        "environment": {"device": "none"},
        "after": after,
    }
    return found | ({"before": {"losses": losses(mean + 1)}} if before else {}) | more


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "arms").mkdir()
    row = {"task": "mqar", "length": 64, "count": 2, "exact": 0.5, "tokens": 0.75, "log_likelihood": -1.0}
    written = [
        result("full", 0, 1.0),
        result("full", 1, 1.1, before=False),
        result("infllmv2", 0, 1.2, 0.8),
        result("infllmv2", 1, 1.4, 0.8, before=False),
        result("infllmv2, half", 0, 1.1, 0.9),
        result("nosa", 0, 1.3, 0.9, tasks=[row]),
        result("nosa", 1, 1.5, 0.94, before=False, other_bias={"none": losses(1.6)}, tasks=[row | {"exact": 0.7}]),
        result("nosa", 2, 9.0, 0.92, before=False),
        result("nosa, half", 0, 1.4, 0.95),
        result("nosa, fitted start", 0, 1.25, 0.9),
    ]
    for number, one in enumerate(written):
        (tmp_path / "arms" / f"{number}.json").write_text(json.dumps(one))
    (tmp_path / "arms" / "ended.partial").write_text("{")
    (tmp_path / "text.json").write_text('{"documents": 3}')
    return tmp_path


def test_a_folder_is_read_by_name_and_seed(folder, tmp_path):
    arms = tables.read(folder)
    assert sorted(arms["nosa"]) == [0, 1, 2] and len(arms) == 6
    with pytest.raises(FileNotFoundError, match="must hold results, got none"):
        tables.read(tmp_path / "arms")


def test_the_interval_is_of_documents():
    assert tables.interval(np.full((5, 16), 0.25)) == [0.25, 0.25, 0.25]  # all alike
    rng = np.random.default_rng(3)
    by_document = rng.normal(2.0, 1.0, 400)
    parts = by_document[:, None] + np.tile([1.0, -1.0], 8)  # parts of a document are not counted one by one
    mean, low, high = tables.interval(parts)
    error = by_document.std() / 20
    assert mean == pytest.approx(by_document.mean(), abs=1e-5)
    assert (high - mean) / error == pytest.approx(1.96, abs=0.1) == (mean - low) / error


def test_arms_are_compared_by_the_seeds_that_both_have(folder):
    arms = tables.read(folder)
    found = tables.compared(arms, "nosa", "infllmv2", "after")
    assert found["seeds"] == 2 and found["all"] == found["end"] == [0.1, 0.1, 0.1]
    assert tables.compared(arms, "nosa", "infllmv2", "before")["seeds"] == 1
    assert tables.compared(arms, "nosa", "dma", "after") is None
    assert tables.compared({"a": {0: arms["nosa"][1]}, "b": {0: arms["full"][0]}}, "a", "b", "before") is None


def test_an_arm_is_compared_to_the_same_budget(folder):
    arms = tables.read(folder)
    others = {name: tables.other_of(name, arms, "infllmv2") for name in arms}
    half = {"infllmv2, half", "nosa, half"}
    assert {name for name, other in others.items() if other == "infllmv2, half"} == half
    assert {other for name, other in others.items() if name not in half} == {"infllmv2"}
    arms = {"full", "full, rate x 3", "nosa, rate x 3", "nosa, half"}
    assert [tables.other_of(name, arms, "full") for name in sorted(arms)] == [
        "full", "full, rate x 3", "full", "full, rate x 3",
    ]  # fmt: skip


def test_query_shares_are_drawn_where_there_are_three(tmp_path):
    def arm(variant, query, answered=True):
        attention = {"variant": variant, "num_selected_blocks": 8, "num_sink_blocks": 1, "num_local_blocks": 3}
        after = {"less full": {"all": [0.1, 0.05, 0.2]}, "misses": {str(n): [1.0, None] for n in (8, 10, 12, 16)}}
        tasks = {"tasks": [{"task": "niah_single", "length": 64, "tokens": [0.5, None]}]} if answered else {}
        return {"attention": attention | {"num_query_blocks": query}, "after": after, **tasks}

    path = tmp_path / "shares.png"
    table = {"nosa": arm("nosa", 2), "infllmv2": arm("infllmv2", 2), "nosa, query share 0.5": arm("nosa", 4, False)}
    figures.query_share(table, path)
    assert not path.exists()
    figures.query_share(table | {"nosa, query share 0.125": arm("nosa", 1)}, path)
    assert path.exists()
    assert figures._query_share(table["infllmv2"]["attention"]) == 0.5


def test_the_summary(folder):
    table = tables.summary(tables.read(folder))
    nosa = table["nosa"]
    assert nosa["seeds"] == [0, 1, 2] and nosa["attention"] == {"variant": "nosa"}
    mean, deviation = nosa["after"]["loss"]["all"]
    assert mean == pytest.approx(np.mean([1.3, 1.5, 9.0]) + 0.25, abs=1e-5)
    assert deviation == pytest.approx(np.std([1.3, 1.5, 9.0], ddof=1), abs=1e-5)
    assert nosa["after"]["loss"]["end"][0] == pytest.approx(mean + 0.75, abs=1e-5)
    assert nosa["before"]["loss"]["first quarter"] == [2.3, None]  # of one seed
    assert nosa["after"]["gamma"][0] == 0.92 and nosa["after"]["misses"]["10"][0] == 0.08
    assert nosa["after"]["locality after 32"] == {"gamma": [1.0, 0.0], "misses": {"8": [0.5, 0.0]}}
    assert nosa["other_bias"]["none"]["end"] == [2.6, None]
    asked = {"task": "mqar", "length": 64, "count": 2, "tokens": [0.75, 0.0], "log_likelihood": [-1.0, 0.0]}
    assert nosa["tasks"] == [asked | {"exact": [0.6, 0.14142]}] and "tasks_before" not in nosa
    differences = {name: {key for key in entry["after"] if "less" in key} for name, entry in table.items()}
    assert differences["infllmv2"] == {"less full"} and differences["full"] == {"less infllmv2"}
    assert differences["nosa, half"] == {"less infllmv2, half", "less full"}
    lines = tables.markdown(table).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    half = next(line for line in lines if line.startswith("| nosa, half"))
    assert "| +0.3000 (+0.3000 to +0.3000) |" in half and half.endswith("| 0.950 | 0.20, 0.05 |")
    assert next(line for line in lines if line.startswith("| full")).endswith("|  |  |")


def test_json_and_figures_are_written(folder, capsys):
    tables.main([str(folder), "--output", str(folder / "out" / "study.json")])
    written = json.loads((folder / "out" / "study.json").read_text())
    assert set(written) == {"environment", "text", "arms"} and written["text"] == {"documents": 3}
    assert {file.name for file in (folder / "out").iterdir()} == {
        "study.json",
        "study_quality.png",
        "study_position.png",
    }
    losses, _, tasks = capsys.readouterr().out.partition("| task, tokens |")
    assert losses.count("\n") == 2 + len(written["arms"])
    assert tasks.splitlines() == [" nosa |", "|---|---|", "| mqar, 64 | 0.60 (0.75) |"]
