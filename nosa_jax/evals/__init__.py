"""How well long-context models read: the likelihood of tokens, tasks of any length, their scores, and lm-eval.

    from nosa_jax import evals
    from nosa_jax.hf import ByteTokenizer

    likely = evals.log_likelihood(model, tokens)               # float32 [B, T], nats; 0 for the first token
    print(evals.perplexity_by_position(model, tokens, parts=4).perplexity)
    examples = evals.make("niah_single", length=512, tokenizer=ByteTokenizer(), count=3, depth=0.5)
    print(examples[0].prompt, examples[0].answer)
    table = evals.evaluate(model, ByteTokenizer(), tasks=("mqar", "kv_json"), lengths=(512,), count=2)
    print(table)                                               # table.save("evals.json"), table.plot("evals.png")

`evals.TASKS` names the tasks, what they ask for and what makes them harder. They follow RULER (arXiv 2404.06654) and
Zoology (arXiv 2312.04927), in words of our own, so their scores cannot be compared with those that others publish.
`nosa_jax.evals.harness` has a model for lm-eval. It and data frames need the extra `evals`, figures the extra `plots`,
`evaluate` and chats the extra `train`.
"""

from nosa_jax.evals.evaluation import evaluate
from nosa_jax.evals.examples import Example, make
from nosa_jax.evals.likelihood import (
    PositionPerplexity,
    TokenScores,
    log_likelihood,
    perplexity_by_position,
    score_tokens,
)
from nosa_jax.evals.metrics import METRICS
from nosa_jax.evals.plots import plot_scores
from nosa_jax.evals.scoring import Forced, answer, score_answers
from nosa_jax.evals.table import Table
from nosa_jax.evals.tasks import TASKS, Haystack, Task, default_haystack

__all__ = [
    "METRICS",
    "TASKS",
    "Example",
    "Forced",
    "Haystack",
    "PositionPerplexity",
    "Table",
    "Task",
    "TokenScores",
    "answer",
    "default_haystack",
    "evaluate",
    "log_likelihood",
    "make",
    "perplexity_by_position",
    "plot_scores",
    "score_answers",
    "score_tokens",
]
