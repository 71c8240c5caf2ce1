"""What is trained on: sources of text, rows and batches in a seeded order whose position can be saved.

    source = text(stdlib_files()[:50], length=512)
    batches = source.batches(batch_size=8, seed=0)
    batch = next(batches)          # a Batch of tokens, targets, mask and segment_ids, each [8, 512]
    state = batches.get_state()    # JSON; set_state() continues on exactly the next batch
    held_out = list(source.heldout(batch_size=8))

`text`, `jsonl`, `tokens` and `chat` read files, `mixture` puts sources together, and whatever has the few methods of
`Source` is one. A `Corpus` is text that is in memory, split; its windows come from `Corpus.source`.
"""

from nosa_jax.train.data.batch import (
    Batch,
    Batches,
    OtherOrderError,
    Source,
    check_blocks,
    check_vocabulary,
    heldout_bytes_per_token,
)
from nosa_jax.train.data.chats import chat
from nosa_jax.train.data.corpus import Corpus, load_corpus
from nosa_jax.train.data.files import find_files, is_binary, read_text, stdlib_files
from nosa_jax.train.data.mixing import mixture
from nosa_jax.train.data.readers import jsonl, text, tokens

__all__ = [
    "Batch",
    "Batches",
    "Corpus",
    "OtherOrderError",
    "Source",
    "chat",
    "check_blocks",
    "check_vocabulary",
    "find_files",
    "heldout_bytes_per_token",
    "is_binary",
    "jsonl",
    "load_corpus",
    "mixture",
    "read_text",
    "stdlib_files",
    "text",
    "tokens",
]
