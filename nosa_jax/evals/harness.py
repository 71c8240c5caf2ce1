"""A model for lm-eval, EleutherAI's harness for language models, under the name `nosa_jax`.

    from nosa_jax.evals.harness import NosaJax
    from nosa_jax.hf import ByteTokenizer

    lm = NosaJax(model, ByteTokenizer())                       # lm_eval.simple_evaluate(lm, tasks=["lambada_openai"])

Importing this module registers it: `simple_evaluate(model="nosa_jax", model_args="pretrained=path/to/NOSA-8B")` then
loads a folder. Needs the extra `evals`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from nosa_jax._extras import import_extra
from nosa_jax.config import CacheConfig
from nosa_jax.decode import GREEDY, Sampling, stream
from nosa_jax.evals.batches import like_lengths, rows_for, stacked
from nosa_jax.evals.chats import TemplateLike, as_template
from nosa_jax.evals.examples import Tokenizer, require_tokenizer
from nosa_jax.evals.likelihood import CHUNK
from nosa_jax.evals.scoring import score_rows
from nosa_jax.hf import ByteTokenizer, from_pretrained, load_tokenizer
from nosa_jax.model import NosaLM
from nosa_jax.train.data.tokenize import progress_bar
from pallas_kernels.checks import bad_value, require_int, require_number, require_type

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

import_extra("lm_eval")

from lm_eval import utils  # noqa: E402
from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.api.registry import register_model  # noqa: E402

_CHECK_EVERY = 8  # tokens, for strings that end a text
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN = {"until", "do_sample", "temperature", "top_k", "top_p", *_LIMITS}


class Manner(NamedTuple):
    """How texts are generated. until: strings that end one. new: tokens, at most."""

    until: tuple[str, ...]
    new: int
    sampling: Sampling


@register_model("nosa_jax")
class NosaJax(TemplateLM):
    """A NosaLM as lm-eval asks for it.

    model: of any variant.
    tokenizer: the model's, see `nosa_jax.hf.load_tokenizer`.
    batch_size: requests that are read together; None and "auto" for at most 16 and 65536 tokens.
    max_length: tokens of context and continuation; None for what the model says. Longer contexts lose their beginning.
    max_gen_toks: tokens that are generated where a task does not say.
    prefix_token_id: stands before a text without context; None for the begin-of-text token of the model's folder, else
        for the one that ends text, else, where tokens are bytes, for a line end.
    add_bos_token: whether contexts get the tokenizer's special tokens; None for yes, unless a text begins with them.
    cache: where the KV cache lives while text is generated.
    chunk: see `log_likelihood`.
    template: of chats, see `make`; None for the one that the model came with.
    seed: of sampling. Each request has its own random key, whatever the batches.
    """

    backend = "causal"

    def __init__(
        self,
        model: NosaLM,
        tokenizer: Tokenizer,
        *,
        batch_size: int | str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        add_bos_token: bool | None = None,
        cache: CacheConfig = CacheConfig(),
        chunk: int = CHUNK,
        template: TemplateLike = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_type("model", model, NosaLM, "Build one with NosaLM(...) or from_pretrained(...).")
        require_tokenizer(tokenizer)
        self.model, self.tokenizer, self.cache = model, tokenizer, cache
        given = None if batch_size in (None, "auto") else int(batch_size)
        self.batch_size = None if given is None else require_int("batch_size", given, 1)
        self.max_length = require_int("max_length", model.config.max_context if max_length is None else max_length, 2)
        self.max_gen_toks = require_int("max_gen_toks", max_gen_toks, 1)
        self.chunk, self.seed = require_int("chunk", chunk, 1), require_int("seed", seed, 0)
        self._prefix, self._add_bos, self._template = prefix_token_id, add_bos_token, template

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> NosaJax:
        """A model from `pretrained=FOLDER` and other arguments, see `create_from_arg_obj`."""
        return cls.create_from_arg_obj(utils.simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> NosaJax:
        """A model from a folder.

        arg_dict: `pretrained`, the folder; `dtype` and `variant`, see `from_pretrained`; `offload` and `slots`, see
            `CacheConfig`; others as of the class.
        additional_config: what lm-eval adds; its `device` and `max_batch_size` mean nothing here.
        """
        given = {**arg_dict, **{name: value for name, value in (additional_config or {}).items() if value is not None}}
        for name in ("device", "max_batch_size"):
            given.pop(name, None)
        folder = given.pop("pretrained", None)
        if folder is None:
            raise bad_value("pretrained", "must name a folder", None, 'Pass model_args="pretrained=path/to/model".')
        how = {name: given.pop(name) for name in ("dtype", "variant") if name in given}
        model = from_pretrained(folder, **how)
        cache = CacheConfig(offload=given.pop("offload", True), slots=given.pop("slots", None))
        return cls(model, load_tokenizer(folder, model.config.vocab_size), cache=cache, **given)

    # --- tokens ---------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The first token that ends text."""
        return self.model.stop_tokens[0] if self.model.stop_tokens else self.prefix_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        begin = self.model.origin.config.get("bos_token_id")
        for found in (self._prefix, begin, *self.model.stop_tokens[:1]):
            if found is not None:
                return int(found)
        if isinstance(self.tokenizer, ByteTokenizer):
            return ord("\n")
        remedy = "Name one of the tokenizer's special tokens, the one that begins or ends a text."
        raise bad_value("prefix_token_id", "must be given, as the model's folder names none,", None, remedy)

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's caches of requests."""
        return f"{type(self.tokenizer).__name__}-{self.tokenizer.vocab_size}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text, with special tokens unless it begins with one or the caller says no."""
        if isinstance(self.tokenizer, ByteTokenizer):
            return self.tokenizer.encode(string)
        added = self._add_bos if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None:
            prefix = self.tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
            if prefix and string.startswith(prefix):
                added = False
        return self.tokenizer.encode(string, add_special_tokens=added is None or bool(added))

    def tok_decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return self.tokenizer.decode(list(tokens))

    def chat_template(self, chat_template: bool | str = False) -> str:
        """A name of the template, for lm-eval's records; empty where none is asked for."""
        return as_template(self._template, self.model.origin.files).name if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text: up to where the assistant speaks, or else up to the end of what was said last."""
        template = as_template(self._template, self.model.origin.files)
        text = template.render(chat_history, prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        said = chat_history[-1]["content"].rstrip()
        end = text.rfind(said)
        return text[: end + len(said)] if end >= 0 else text

    # --- requests -------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Of each (texts, context, continuation) the log-likelihood of the continuation, and whether it is greedy."""
        rows, begins = [], []
        for _texts, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                rule = f"must be of 1 to max_length = {self.max_length} tokens"
                raise bad_value("continuation", rule, len(continuation), "Raise max_length, or correct the task.")
            # A token more than is read: nothing follows the last one.
            row = [*context, *continuation][-(self.max_length + 1) :]
            rows.append(row)
            begins.append(len(row) - len(continuation))
        with progress_bar("log-likelihoods", total=len(rows), unit="", shown=not disable_tqdm) as bar:
            found = score_rows(
                self.model, rows, begins, batch_size=self.batch_size, chunk=self.chunk, advance=bar.update
            )
        results = []
        for (texts, _context, continuation), (total, hits) in zip(requests, found, strict=True):
            results.append((total, hits == len(continuation)))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, results[-1])
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of each text its log-likelihood, in windows of `max_length` tokens that predict every token once."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            pairs = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for pair in pairs:
                windows.append((None, *utils.make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (total, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Of each (context, how) the text that follows, up to a string or token that ends it."""
        arguments = [request.args for request in requests]
        alike: dict[str, list[int]] = {}
        for number, (_, how) in enumerate(arguments):
            alike.setdefault(json.dumps(how, sort_keys=True, default=str), []).append(number)
        manners = {key: self._manner(arguments[numbers[0]][1]) for key, numbers in alike.items()}
        texts = [""] * len(requests)
        with progress_bar("texts", total=len(requests), unit="", shown=not disable_tqdm) as bar:
            for key, numbers in alike.items():
                manner = manners[key]
                contexts = {number: self._context(arguments[number][0], manner.new) for number in numbers}
                for group in like_lengths([len(contexts[number]) for number in numbers], self.batch_size):
                    chosen = [numbers[place] for place in group]
                    rows = [contexts[number] for number in chosen]
                    batch = min(rows_for(len(rows[0]), self.batch_size), len(numbers))
                    for number, text in zip(chosen, self._texts(rows, chosen, batch, manner), strict=True):
                        texts[number] = text
                        self.cache_hook.add_partial("generate_until", arguments[number], text)
                    bar.update(len(group))
        return texts

    def _context(self, text: str, new: int) -> list[int]:
        """The last tokens of a text that leave room for `new` ones."""
        return (self.tok_encode(text) or [self.prefix_token_id])[-(self.max_length - new) :]

    def _manner(self, how: Mapping[str, Any]) -> Manner:
        """What a task's `generation_kwargs` ask for. Raises ValueError for what is not supported."""
        unknown = sorted(set(how) - _KNOWN)
        if unknown:
            raise bad_value("generation_kwargs", f"must be among {sorted(_KNOWN)}", unknown, "Drop it from the task.")
        until = how.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(string for string in until if string)
        limits = [how[name] for name in _LIMITS if how.get(name) is not None]
        new = require_int("max_gen_toks", limits[0] if limits else self.max_gen_toks, 1)
        if new >= self.max_length:
            rule = f"must leave room for a context in max_length = {self.max_length}"
            raise bad_value("max_gen_toks", rule, new, "Lower it, or raise max_length.")
        temperature = how.get("temperature")
        drawn = bool(temperature) if how.get("do_sample") is None else bool(how["do_sample"])
        if not drawn or temperature == 0:
            return Manner(until, new, GREEDY)
        temperature = require_number("temperature", 1.0 if temperature is None else temperature, 0.0)
        return Manner(until, new, Sampling(temperature, how.get("top_k") or None, how.get("top_p") or 1.0))

    def _texts(self, rows: Sequence[list[int]], numbers: Sequence[int], batch: int, manner: Manner) -> list[str]:
        """What follows rows of token ids, which are those of the requests with these numbers."""
        key = None
        if manner.sampling is not GREEDY:
            own = jnp.asarray([*numbers, *[numbers[0]] * (batch - len(numbers))], jnp.uint32)
            key = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(self.seed), own)
        stops = set(self.model.stop_tokens)
        tokens, lengths = stacked(rows, batch)
        steps: Iterator[Any] = stream(
            self.model, tokens, lengths, max_new_tokens=manner.new, cache=self.cache, sampling=manner.sampling,
            key=key, stop_tokens=stops,
        )  # fmt: skip
        said: list[list[int]] = [[] for _ in rows]
        open_rows = set(range(len(rows)))
        for count, step in enumerate(steps, 1):
            for row in list(open_rows):
                if int(step[row]) in stops:
                    open_rows.discard(row)
                else:
                    said[row].append(int(step[row]))
            # Text is looked at now and then only: to decode it takes longer than a step of a small model.
            if count % _CHECK_EVERY == 0:
                open_rows = {row for row in open_rows if not _ends(self.tok_decode(said[row]), manner.until)}
            if not open_rows:
                break
        return [_cut(self.tok_decode(ids), manner.until) for ids in said]


def _ends(text: str, until: Sequence[str]) -> bool:
    return any(string in text for string in until)


def _cut(text: str, until: Sequence[str]) -> str:
    """The text up to the first of these strings."""
    for string in until:
        text = text.partition(string)[0]
    return text
