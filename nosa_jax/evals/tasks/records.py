"""A table of which every row has to be looked at: all records that satisfy something."""

from __future__ import annotations

import numpy as np

from nosa_jax.evals.tasks.task import Draft, Source, Task, count_option, numbers

_CITIES = ("Bergen", "Cusco", "Dakar", "Gdansk", "Hobart", "Kyoto", "Lisbon", "Oaxaca")
_YEARS = tuple(range(2008, 2024))


def _records(source: Source, size: int) -> Draft:
    random, matches = source.random, source.options["matches"]
    rows = matches + size
    city, year = str(random.choice(_CITIES)), int(random.choice(_YEARS))
    others = [other for other in _CITIES if other != city]
    years = [other for other in _YEARS if other != year]
    ids = [f"R{number}" for number in numbers(random, rows, digits=6)]
    kinds = np.zeros(rows, int)
    kinds[:matches] = 1
    # A third of the others have the right city, a third the right year: one column alone decides nothing.
    kinds[matches:] = 2 + random.integers(0, 3, size)
    units = random.integers(100, 1000, rows).tolist()
    lines, wanted, places = [], [], []
    intro = "Each line of the following table is a record.\n\nid | city | year | units\n"
    at = len(intro)
    for row, kind in enumerate(random.permutation(kinds).tolist()):
        right_city, right_year = kind in (1, 2), kind in (1, 3)
        in_city = city if right_city else others[int(random.integers(len(others)))]
        in_year = year if right_year else years[int(random.integers(len(years)))]
        lines.append(f"{ids[row]} | {in_city} | {in_year} | {units[row]}")
        if kind == 1:
            wanted.append(ids[row])
            places.append(at)
        at += len(lines[-1]) + 1
    question = (
        f"Which records have the city {city} and the year {year}? Give the ids of all of them, from top to bottom."
    )
    body = f"{intro}{'\n'.join(lines)}\n\n{question}"
    lead = f"The records with the city {city} and the year {year} are"
    return Draft(body, lead, f" {', '.join(wanted)}", tuple(wanted), tuple(places))


TASKS = (
    Task(
        "extract_records",
        "A long table has records that satisfy two conditions, spread over all of it; which?",
        "f1",
        {"matches": count_option(6, "records that satisfy them")},
        _records,
    ),
)
