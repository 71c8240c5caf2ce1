"""Makes the notebooks, without outputs, from their scripts in jupytext's percent form, which are what one edits.

    python -m experiments.notebooks.convert

Every notebook is written anew: outputs that one has are lost.
"""

from __future__ import annotations

import argparse
from pathlib import Path

FOLDER = Path(__file__).parent
SCRIPTS = [file for file in sorted(FOLDER.glob("*.py")) if "# %%" in file.read_text(encoding="utf-8").splitlines()]


def notebook(script: Path) -> str:
    """The JSON of a script's notebook. Ids of cells are their numbers, so that nothing changes but what was edited."""
    import jupytext

    made = jupytext.read(script)
    for number, cell in enumerate(made.cells):
        cell["id"] = f"cell-{number}"
    return jupytext.writes(made, fmt="ipynb")


def main(arguments: list[str] | None = None) -> None:
    """Writes them beside the scripts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    for script in SCRIPTS:
        script.with_suffix(".ipynb").write_text(notebook(script), encoding="utf-8")
        print(f"wrote {script.with_suffix('.ipynb')}")


if __name__ == "__main__":
    main()
