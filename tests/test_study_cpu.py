"""The study at the size of a CPU: the signs of the large one, where they are significant."""

from __future__ import annotations

import pytest

from experiments.study import run, tables


@pytest.mark.slow
def test_the_small_study_has_the_signs_of_the_large_one(tmp_path, capsys):
    """One seed of the four variants, from a dense model that is trained first; minutes."""
    run.main(["--size", "cpu", "--seeds", "1", "--arms", "full", "infllmv2", "nosa", "dma", "--output", str(tmp_path)])
    table = tables.summary(tables.read(tmp_path))
    after = {name: entry["after"] for name, entry in table.items()}
    gamma = {name: after[name]["gamma"][0] for name in ("infllmv2", "nosa", "dma")}
    assert gamma["infllmv2"] + 0.05 < gamma["nosa"] < gamma["dma"] - 0.05
    for slots, most in (("8", 0.75), ("10", 0.7)):
        assert after["nosa"]["misses"][slots][0] < most * after["infllmv2"]["misses"][slots][0]
    # So small a model hardly looks back: differences of losses are seldom significant, and then not the other way.
    for name, below in (("dma", "infllmv2"), ("infllmv2", "full")):
        assert after[name][f"less {below}"]["all"][2] > 0
    tables.main([str(tmp_path), "--output", str(tmp_path / "study.json")])
    assert (tmp_path / "study_quality.png").is_file() and "| nosa | 1 |" in capsys.readouterr().out
