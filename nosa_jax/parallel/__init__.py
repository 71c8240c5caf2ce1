"""Many devices: the axes of a mesh, the one table that says what is cut along which, and how the model uses both.

    mesh = parallel.make_mesh(fsdp=-1)  # all devices along one axis; make_mesh(data=2, fsdp=4) is for eight
    model = parallel.shard(model, mesh)
    out = nosa_jax.forward(model, tokens, logits="none")  # finds the mesh in its arguments

JAX's partitioner is the engine: products are cut as their operands are. Attention and selection run inside
`jax.shard_map`, every device its own rows, KV heads and queries. Axes of a mesh:

- `data`: rows of the batch; each device holds the whole model.
- `fsdp`: rows too, with the model and the optimizer cut along it. A layer's weights are gathered when it runs.
- `tensor`: KV heads with their query heads, the MLP's inner axis, and the vocabulary of the head.
- `context`: the queries of a row. Keys, values and importance are gathered, which are small with few KV heads. Each
  device has a piece from the beginning of a row and one from its end, so that all have the same causal work.
"""

from nosa_jax.parallel.mesh import (
    AXES,
    ROWS,
    concrete_mesh,
    current,
    fitting,
    make_mesh,
    mesh_of,
    require_axes,
    size_of,
)
from nosa_jax.parallel.program import activations, by_rows, constrain, rows_of, run
from nosa_jax.parallel.rows import (
    PIECES,
    all_tokens,
    context_size,
    in_query_order,
    in_row_order,
    per_row_and_head,
    query_order,
)
from nosa_jax.parallel.rules import (
    RULES,
    as_lying,
    from_host,
    gather,
    gathers,
    keep_all_but_gathered,
    shard,
    shardings,
    spec,
    specs,
)
from nosa_jax.processes import OtherProcessError, initialize

__all__ = [
    "AXES",
    "PIECES",
    "ROWS",
    "RULES",
    "OtherProcessError",
    "activations",
    "all_tokens",
    "as_lying",
    "by_rows",
    "concrete_mesh",
    "constrain",
    "context_size",
    "current",
    "fitting",
    "from_host",
    "gather",
    "gathers",
    "in_query_order",
    "in_row_order",
    "initialize",
    "keep_all_but_gathered",
    "make_mesh",
    "mesh_of",
    "per_row_and_head",
    "query_order",
    "require_axes",
    "rows_of",
    "run",
    "shard",
    "shardings",
    "size_of",
    "spec",
    "specs",
]
