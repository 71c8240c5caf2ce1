"""Results of lm-eval's own backend `hf` on a tiny Llama, for three tasks of local data.

    python -m experiments.golden_lm_eval --output tests/golden/lm_eval.json

Writes what `tests/test_evals_harness.py` compares with: by task the results, and of each document the responses. The
model is a case of `tests/golden/hf`, its tokens are bytes. Needs torch, transformers, accelerate and lm-eval.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "hf"
CASE = "llama-llama3"
MAX_LENGTH = 96  # shorter than some texts, so that windows and truncation matter
WORDS = ("river", "stone", "cloud", "lamp", "bread", "mirror", "violin", "harvest", "needle", "winter")


def write_model(folder: Path) -> Path:
    """The folder of the model, with a tokenizer.json of bytes, of which 0 ends a text."""
    from safetensors.numpy import load_file, save_file

    from nosa_jax.hf import ByteTokenizer

    case = json.loads((GOLDEN / "cases.json").read_text())[CASE]
    weights = load_file(GOLDEN / "weights.safetensors")
    tensors = {name: tensor for name, tensor in weights.items() if not name.endswith(tuple(case["lacking"]))}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(case["config"] | {"eos_token_id": 0, "torch_dtype": "float32"}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_text(ByteTokenizer().to_json())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": chr(256),
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_tasks(folder: Path) -> list[dict[str, Any]]:
    """Configurations of three tasks for lm-eval, whose data are written to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = [
        {
            "question": f"Which of these is number {n}, " + ", ".join(WORDS[: n + 2]) + "?",
            "choices": [WORDS[n], WORDS[(n + 3) % 10], f"{WORDS[(n + 5) % 10]} and more"],
            "label": n % 3,
            "text": " ".join(WORDS[(n * k) % 10] for k in range(1, 6 * n + 2)),
            "target": WORDS[n],
        }
        for n in range(6)
    ]
    file = folder / "documents.jsonl"
    file.write_text("".join(json.dumps(document) + "\n" for document in documents))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "metadata": {"version": 1},
    }
    perplexities = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    return [
        shared
        | {
            "task": "local_choices",
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        shared
        | {
            "task": "local_rolling",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": name} for name in perplexities],
        },
        shared
        | {
            "task": "local_generate",
            "output_type": "generate_until",
            "doc_to_text": "{{text}} {{target}}:",
            "doc_to_target": "{{target}}",
            "generation_kwargs": {"until": ["\n", "mU", "=="], "max_gen_toks": 20, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    ]


def run(lm: Any, tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """By task the results, and of each document the responses."""
    from lm_eval import simple_evaluate

    found = simple_evaluate(lm, tasks=tasks, bootstrap_iters=0, log_samples=True)
    return {
        name: {
            "results": {key: value for key, value in results.items() if isinstance(value, float)},
            "responses": [sample["filtered_resps"] for sample in sorted(found["samples"][name], key=_number)],
        }
        for name, results in found["results"].items()
    }


def _number(sample: dict[str, Any]) -> int:
    return sample["doc_id"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    output = parser.parse_args().output
    from lm_eval.models.huggingface import HFLM

    folder = Path(tempfile.mkdtemp())
    try:
        model = write_model(folder / "model")
        lm = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=4, max_length=MAX_LENGTH)
        found = run(lm, write_tasks(folder / "tasks"))
    finally:
        shutil.rmtree(folder)
    output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({name: task["results"] for name, task in found.items()}, indent=1))


if __name__ == "__main__":
    main()
