"""Pairs of keys and values and nothing else: associative recall (after Zoology, arXiv 2312.04927) and a JSON object."""

from __future__ import annotations

from nosa_jax.evals.tasks.task import Draft, Source, Task, count_option, depth_option, invented_words, uuids


def _mqar(source: Source, size: int) -> Draft:
    random, queries = source.random, source.options["queries"]
    pairs = queries + size
    words = invented_words(random, 2 * pairs)
    lines = [f"{key} {value}" for key, value in zip(words[:pairs], words[pairs:], strict=True)]
    asked = random.choice(pairs, queries, replace=False).tolist()
    intro = "Each line of the following list gives a key and its value.\n\n"
    starts = [len(intro)]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    keys, wanted = [words[number] for number in asked], tuple(words[pairs + number] for number in asked)
    question = f"What are the values of the keys {', '.join(keys)}? Give one value for each, in this order."
    body = "\n".join([intro.rstrip("\n"), "", *lines, "", question])
    return Draft(body, "The values are", f" {', '.join(wanted)}", wanted, tuple(starts[number] for number in asked))


def _kv_json(source: Source, size: int) -> Draft:
    random = source.random
    texts = uuids(random, 2 * (size + 1))
    pairs = [f'"{key}": "{value}"' for key, value in zip(texts[::2], texts[1::2], strict=True)]
    asked = min(int(source.depth() * len(pairs)), size)
    intro = "The following JSON object maps keys to values.\n\n{"
    mark = len(intro) + sum(len(pair) + 2 for pair in pairs[:asked])
    key, value = texts[2 * asked], texts[2 * asked + 1]
    body = f'{intro}{",\n".join(pairs)}}}\n\nWhat is the value of the key "{key}"?'
    return Draft(body, f'The value of "{key}" is', f' "{value}"', (value,), (mark,))


TASKS = (
    Task(
        "mqar",
        "A long list gives every key its value; what are those of some keys? (multi-query associative recall)",
        "recall",
        {"queries": count_option(4, "keys that are asked for")},
        _mqar,
    ),
    Task(
        "kv_json",
        "A long JSON object maps UUIDs to UUIDs; what is the value of one key?",
        "recall",
        {"depth": depth_option()},
        _kv_json,
    ),
)
