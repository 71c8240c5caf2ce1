"""Launch parameters: which entry of the device's file is taken, and which are refused."""

from __future__ import annotations

import json

import jax
import pytest
from targets import target

from pallas_kernels import _tuning
from pallas_kernels._tuning import Launch, checked, launch_of

DEFAULT = Launch(rows=64, num_warps=4, num_stages=2)
WIDE = {"rows": 128, "num_warps": 8, "num_stages": 1}


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """A function that writes the file of the device "Some GPU" and has the kernels read it."""
    monkeypatch.setattr(_tuning.resources, "files", lambda package: tmp_path / package)
    _tuning._entries.cache_clear()

    def write(kernel, *entries):
        folder = tmp_path / "pallas_kernels" / "tuned"
        folder.mkdir(parents=True)
        (folder / "some_gpu.json").write_text(json.dumps({"kernels": {kernel: entries}}))

    with jax.sharding.use_abstract_mesh(target("Some GPU")):
        yield write
    _tuning._entries.cache_clear()


def entry(launch, **match):
    return {"match": match, "launch": launch, "ms": 1.0, "case": "any"}


def test_no_file(tuned):
    assert launch_of("attend", DEFAULT, dim=128) == DEFAULT


def test_the_first_entry_that_matches(tuned):
    narrow, any_group = WIDE | {"rows": 32}, WIDE | {"keys": 128}
    tuned("attend", entry(narrow, dim=64, group=4), entry(WIDE, dim=128, group=4), entry(any_group, dim=128))
    assert launch_of("attend", DEFAULT, dim=64, group=4, dtype="bfloat16") == Launch(**narrow)
    assert launch_of("attend", DEFAULT, dim=128, group=4, dtype="bfloat16") == Launch(**WIDE)
    assert launch_of("attend", DEFAULT, dim=128, group=8, dtype="bfloat16") == Launch(**any_group)
    assert launch_of("attend", DEFAULT, dim=64, group=8, dtype="bfloat16") == DEFAULT
    assert launch_of("attend", DEFAULT, group=4) == DEFAULT  # an entry asks for what the kernel does not say
    assert launch_of("other", DEFAULT, dim=128, group=4) == DEFAULT


def test_another_device(tuned):
    tuned("attend", entry(WIDE))
    assert launch_of("attend", DEFAULT, dim=128) == Launch(**WIDE)
    with jax.sharding.use_abstract_mesh(target("Another GPU")):
        assert launch_of("attend", DEFAULT, dim=128) == DEFAULT


BAD = [
    ({"rows": 48}, "rows: must be a power of two, got 48"),
    ({"rows": 0}, "rows: must be a power of two, got 0"),
    ({"num_warps": 3}, "num_warps: must be a power of two, got 3"),
    ({"num_warps": 64}, r"num_warps: must be in \[1, 32\], got 64"),
    ({"num_stages": 0}, r"num_stages: must be in \[1, 8\], got 0"),
    ({"num_stages": 9}, r"num_stages: must be in \[1, 8\], got 9"),
    ({"keys": 100}, "keys: must be a power of two, got 100"),
]


@pytest.mark.parametrize("wrong, message", BAD)
def test_bad_entries_are_refused(tuned, wrong, message):
    tuned("attend", entry(WIDE | wrong))
    with pytest.raises(ValueError, match=rf"^{message}\. Correct the entry"):
        launch_of("attend", DEFAULT, dim=128)


def test_launches_chosen_while_tuning():
    def choose(kernel, launch, shape):
        return launch._replace(rows=16) if kernel == "attend" and shape == {"dim": 128} else launch

    with _tuning.chosen_by(choose):
        assert launch_of("attend", DEFAULT, dim=128) == DEFAULT._replace(rows=16)
        assert launch_of("attend", DEFAULT, dim=64) == launch_of("other", DEFAULT, dim=128) == DEFAULT
    assert launch_of("attend", DEFAULT, dim=128) == DEFAULT


def test_files_that_come_with_the_package():
    """Every entry can be launched, and says what was timed."""
    folder = _tuning.resources.files("pallas_kernels") / "tuned"
    for file in folder.iterdir() if folder.is_dir() else ():
        for entries in json.loads(file.read_text())["kernels"].values():
            for found in entries:
                assert set(found) == {"match", "launch", "ms", "case", "candidates"}
                checked(**found["launch"])
