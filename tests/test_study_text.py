"""Source code of packages as long documents, whole packages held out."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.study import text

LENGTH = 64


@pytest.fixture
def root(tmp_path):
    """Twelve packages of three files; all vendor the same, a file is broken."""
    rng = np.random.default_rng(0)
    for n in range(12):
        folder = tmp_path / f"package{n}"
        (folder / "_vendor").mkdir(parents=True)
        (folder / "__init__.py").write_text("")
        for name in ("a", "b"):
            (folder / f"{name}.py").write_text("".join(map(chr, rng.integers(97, 123, 150))))
        (folder / "_vendor" / "copy.py").write_text("copied " * 100)
    (tmp_path / "package3" / "broken.py").write_bytes(b"\xff\xfe")
    (tmp_path / "no_package").mkdir()
    (tmp_path / "no_package" / "file.py").write_text("not a package")
    return tmp_path


def test_packages_are_held_out_whole(root):
    found = text.packages(root)
    assert list(found) == sorted(f"package{n}" for n in range(12)) and len(found["package0"]) == 3
    assert text.joined(found["package3"]).startswith("# package3/a.py\n") and "copied" not in text.joined(
        found["package3"]
    )
    made = text.packages_source(found, length=LENGTH, block_size=16, heldout_fraction=0.4, documents_per_package=3)
    held = {name for name in found if text.is_held_out(name, 0.4)}
    assert 0 < len(held) < 12 and set(made.heldout) == held and made.dropped == []
    rows = [bytes(row.tokens.astype(np.uint8)) for row in made.source.heldout_rows()]
    assert len(rows) == 3 * len(held) == len(made.overlap) and max(made.overlap) == 0.0
    texts = {name: text.joined(found[name]).encode() for name in found}
    for row in rows:
        assert next(name for name in found if row in texts[name]) in held
    trained = sum(len(texts[name]) for name in found if name not in held)
    assert made.source.train_tokens == trained
    short = text.packages_source(found, length=LENGTH, block_size=16, heldout_fraction=0.4, join=False)
    assert short.source.train_tokens == trained - 2 * (12 - len(held))  # the two line ends between the files
    assert text.half_long(made, short).heldout_tokens == LENGTH * (3 + 2) * len(held)
    cut = text.packages_source(found, length=LENGTH, block_size=16, heldout_fraction=0.4, most_characters=100)
    assert cut.source.train_tokens == 100 * (12 - len(held)) and cut.source.heldout_tokens == LENGTH * len(held)
    with pytest.raises(ValueError, match="most_characters: must be an int >= 1 or None, got 0"):
        text.packages_source(found, most_characters=0)


def test_held_out_copies_are_dropped(root):
    found = text.packages(root)
    held = [name for name in found if text.is_held_out(name, 0.4)]
    other = next(name for name in found if name not in held)
    for name in ("a", "b"):
        (root / held[0] / f"{name}.py").write_text((root / other / f"{name}.py").read_text())
    made = text.packages_source(found, length=LENGTH, block_size=16, heldout_fraction=0.4, documents_per_package=1)
    assert [name for name, share in made.dropped if share > 0.5] == [held[0]] and len(made.dropped) == 1
    assert made.heldout == held[1:]
    with pytest.raises(ValueError, match="found: must have packages held out, got none"):
        text.packages_source({other: found[other]}, length=LENGTH, block_size=16, heldout_fraction=0.4)
    with pytest.raises(ValueError, match="found: must hold out documents of 1024 tokens of their own"):
        text.packages_source(found, length=1024, block_size=16, heldout_fraction=0.4)


def test_overlap_counts_runs_of_tokens():
    rng = np.random.default_rng(1)
    training = [rng.integers(0, 50_000, 200), rng.integers(0, 50_000, 5)]
    copied = np.concatenate([rng.integers(0, 50_000, 30), training[0][50:70]])  # 38 runs of 13, 8 of them copied
    fresh, tiny = rng.integers(0, 50_000, 40), training[0][:12]
    assert text.overlap(iter(training), [copied, fresh, tiny, training[0]]) == [8 / 38, 0.0, 0.0, 1.0]
    assert text.overlap(training, []) == []
