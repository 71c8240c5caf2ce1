"""Scores by task and length: a table to print, to show in a notebook, to save, and to draw."""

from __future__ import annotations

import dataclasses
import html
import json
import os
from typing import Any

from nosa_jax._extras import import_extra
from nosa_jax._json import parse_object
from nosa_jax._paths import replacing, user_path
from nosa_jax.evals.plots import plot_scores
from pallas_kernels.checks import bad_value

COLUMNS = (
    "task",
    "length",
    "count",
    "metric",
    "score",
    "stderr",
    "forced_exact",
    "forced_tokens",
    "log_likelihood",
    "log_likelihood_per_token",
)
_TEXTS = ("task", "metric")
_NAMES = {"log_likelihood": "log-lik", "log_likelihood_per_token": "per token", "forced_tokens": "forced tok"}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Table:
    """What `evaluate` found.

    label: of the model.
    rows: one dict for each task and length. What was not measured is None.
        task, length, count: which examples, and how many.
        metric: what `score` is the mean of, see `METRICS`; from 0 to 1.
        score, stderr: of what the model answered by greedy decoding, and the standard error of that mean.
        forced_exact: the share of examples whose whole answer greedy decoding would have given (teacher forcing).
        forced_tokens: the share of tokens of the answers that were the likeliest at their place.
        log_likelihood: mean over examples of the log-probability of the whole answer, nats.
        log_likelihood_per_token: mean over all tokens of all answers, nats.
    examples: one dict for each example: task, length, index, depths, answer, output (what the model said), score,
        log_likelihood and forced_exact.
    settings: what the table was made with.
    """

    label: str
    rows: list[dict[str, Any]]
    examples: list[dict[str, Any]]
    settings: dict[str, Any]

    def table(self) -> str:
        """One line per task and length; fixed width."""
        names, rows = self._cells()
        widths = [max(len(row[column]) for row in (names, *rows)) for column in range(len(names))]
        align = lambda column, cell: (
            f"{cell:<{widths[column]}}" if COLUMNS[column] in _TEXTS else cell.rjust(widths[column])
        )
        return "\n".join("  ".join(align(*pair) for pair in enumerate(row)).rstrip() for row in (names, *rows))

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"Table({self.label}: {len(self.rows)} rows, {len(self.examples)} examples)"

    def _repr_html_(self) -> str:
        """How a notebook shows it: the same table."""
        names, rows = self._cells()
        row = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
        body = "".join(row(cells, "td") for cells in rows)
        caption = html.escape(self.label)
        return f"<table><caption>{caption}</caption><thead>{row(names, 'th')}</thead><tbody>{body}</tbody></table>"

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        """Names of columns, and rows of text."""
        return [_NAMES.get(name, name).replace("_", " ") for name in COLUMNS], [
            [_text(row[name]) for name in COLUMNS] for row in self.rows
        ]

    def to_dataframe(self) -> Any:
        """The rows as a pandas DataFrame. Raises ImportError, which says what to install, without pandas."""
        return import_extra("pandas").DataFrame(self.rows, columns=list(COLUMNS))

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain types."""
        return dataclasses.asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything as JSON. Raises OSError where that fails; what was at `path` then stays."""
        with replacing(user_path("path", path)) as file:
            file.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Table:
        """The table of a file that `save` wrote. Raises ValueError for another file."""
        file = user_path("path", path)
        found = parse_object(str(file), file.read_bytes())
        names = [field.name for field in dataclasses.fields(cls)]
        if set(found) != set(names):
            raise bad_value(str(file), f"must have the keys {names}", sorted(found), "Pass what Table.save wrote.")
        return cls(**found)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Score by length, a line for each task, with the standard error as a shade; see `plot_scores`."""
        return plot_scores({self.label: self}, path)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
