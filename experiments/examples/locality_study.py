"""How local are the selections of NOSA, and of InfLLMv2 with the same weights, on the same text?

    python -m experiments.examples.locality_study --out runs/locality

Without `--model`, a tiny model is trained first, for half a minute: untrained weights have no importance to speak of.
The text is fed token by token, so that both methods read the same words. Writes a figure, the selections and a JSON.
"""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path

import numpy as np

import nosa_jax
from nosa_jax import NosaLM, Selections, locality, plots, presets, train


def trained(steps: int) -> NosaLM:
    """A tiny model after a few steps on the source of Python's standard library, one token per byte."""
    corpus = train.load_corpus(train.stdlib_files()[:60], heldout_fraction=0.0)  # nothing to evaluate on
    config = train.TrainConfig(presets.tiny(), steps=steps, batch_size=4, length=256)
    return train.train(config, corpus, progress=False).model


def select(model: NosaLM, text: np.ndarray, prompt: int) -> Selections:
    """What the model selects while it decodes `text[prompt:]` after reading `text[:prompt]`."""
    return locality.record(model, text[:prompt], len(text) - prompt, text[prompt:])


def main(arguments: list[str] | None = None) -> dict[str, locality.LocalityReport]:
    """Returns the reports by method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a checkpoint whose tokens are bytes")
    parser.add_argument("--text", type=Path, default=inspect.getsourcefile(json), help="the file to read")
    parser.add_argument("--train-steps", type=int, default=60, help="of the tiny model, without --model")
    parser.add_argument("--prompt", type=int, default=512, help="tokens to read before the recording starts")
    parser.add_argument("--new", type=int, default=256, help="tokens to decode and record")
    parser.add_argument("--slots", type=int, nargs="+", default=(8, 10, 12, 16), help="sizes of the pool to replay")
    parser.add_argument("--out", type=Path, default=Path("runs/locality"), help="folder for the results")
    args = parser.parse_args(arguments)
    model = nosa_jax.from_pretrained(args.model) if args.model else trained(args.train_steps)
    text = np.fromfile(args.text, np.uint8)[: args.prompt + args.new].astype(np.int32)
    args.out.mkdir(parents=True, exist_ok=True)

    selections, reports, costs = {}, {}, {}
    for variant in ("nosa", "infllmv2"):
        # The same weights under another attention; infllmv2 has no importance to use.
        rival = nosa_jax.with_attention(model, variant=variant)
        selections[variant] = select(rival, text, args.prompt)
        selections[variant].save(args.out / f"{variant}.npz")  # for Selections.load, without the model
        middle = model.config.num_layers // 2
        plots.plot_selection_map(selections[variant], layer=middle, path=args.out / f"{variant}.png")
        reports[variant] = selections[variant].report(args.slots)
        costs[variant] = locality.pool_costs(reports[variant], rival.config, batch=16, max_length=len(text))
    print(locality.comparison_table(reports))
    print(f"\n16 rows of {len(text)} tokens, a bound:\n{locality.cost_table(costs)}")
    plots.plot_comparison(reports, args.out / "comparison.png")
    plots.plot_difference(selections["nosa"], selections["infllmv2"], path=args.out / "difference.png")
    content = {variant: report.to_dict() for variant, report in reports.items()}
    (args.out / "reports.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {args.out}")
    return reports


if __name__ == "__main__":
    main()
