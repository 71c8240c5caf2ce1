"""The only import of the Pallas backends, and what our Triton kernels share: launch, loads, exact and fast maths.

Kernels see whole arrays and compute their own indices. Sizes are powers of two; ids are masked before any address is
formed from them, since the backend zero-extends a negative one.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jax.experimental.pallas import triton as plt
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from pallas_kernels.device import current_device
from pallas_kernels.formulas import weight_shift
from pallas_kernels.varying import alike, axes_of, struct

# The one notice we know and accept: the Triton backend is deprecated, and the only one that runs everywhere we do.
warnings.filterwarnings("ignore", message=".*Pallas Triton backend is deprecated.*", category=DeprecationWarning)

LOG2_E = 1.4426950408889634
LEAST_ROWS = 16  # of a matrix product
LARGE = 1e30  # stands for infinity where infinity - infinity would give NaN

load, store, atomic_add = plt.load, plt.store, plt.atomic_add
program_id, ds, when, loop = pl.program_id, pl.ds, pl.when, pl.loop
plgpu: Any = mosaic_gpu
run_scoped, run_state = pl.run_scoped, pl.run_state

_interpreted: contextvars.ContextVar[bool] = contextvars.ContextVar("interpreted", default=False)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Inside, Triton kernels run on any machine in Pallas' interpreter: slow, for tests."""
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


def _no_nvidia_gpu() -> str | None:
    platform, kind = current_device()
    if platform == "gpu" and not kind.startswith(("AMD", "gfx")):
        return None
    return f"it needs an NVIDIA GPU, the default device is {platform!r} ({kind})"


def cudnn_unavailable() -> str | None:
    """Why cuDNN can take nothing here; None on an NVIDIA GPU, and where we lower for one, that JAX finds cuDNN for."""
    return _no_nvidia_gpu() or _cudnn_missing()


@functools.cache
def _cudnn_missing() -> str | None:
    x = jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.bfloat16)
    try:
        jax.eval_shape(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"), x, x, x)
    except (RuntimeError, NotImplementedError) as error:
        return f"JAX cannot use cuDNN: {error}"
    return None


def triton_unavailable() -> str | None:
    """Why no Triton kernel can run here, or None: a GPU, a lowering for one, and the interpreter are all fine."""
    return None if _interpreted.get() else _no_nvidia_gpu()


def mosaic_unavailable() -> str | None:
    """Why no Mosaic GPU kernel of ours, which are for Hopper, can run here; None where they can."""
    platform, kind = current_device()
    if platform == "gpu" and any(name in kind for name in ("H100", "H200", "H800", "H20", "GH200")):
        return None
    return f"it needs an NVIDIA Hopper GPU, the default device is {platform!r} ({kind})"


def triton_call(
    kernel: Callable[..., None],
    *,
    name: str,
    grid: tuple[int, ...],
    out_shape: Any,
    num_warps: int,
    num_stages: int = 1,
    aliases: dict[int, int] | None = None,
) -> Callable[..., Any]:
    """`pl.pallas_call` with both compiler parameters always given: their defaults change between versions."""
    kernel.__name__ = name  # what profilers show

    def call(*operands: Any) -> Any:
        operands = alike(jax.tree.map(_strongly_typed, operands))
        axes = axes_of(operands)
        return pl.pallas_call(
            kernel,
            grid=grid,
            out_shape=jax.tree.map(lambda x: struct(x.shape, x.dtype, axes), out_shape),
            name=name,
            interpret=_interpreted.get(),
            input_output_aliases=aliases or {},
            compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        )(*operands)

    return call


def _strongly_typed(x: ArrayLike) -> Array:
    """Inside a kernel the lowering takes constants beside weakly typed numbers for booleans."""
    x = x if isinstance(x, jax.Array) else jnp.asarray(x)
    return x.astype(x.dtype) if x.weak_type else x


def dot(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """Matrix product accumulated in float32: tensor cores for 16-bit operands, exact float32 for float32 ones."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def exp2(x: Float[Array, "*shape"], factor: float = 1.0, offset: float = 0.0) -> Float[Array, "*shape"]:
    """2**(factor * x + offset), the power in one instruction (2 units in the last place, below 2**-126 it is zero)."""
    if _interpreted.get():
        return jnp.exp2(x * factor + offset)
    if offset:
        exponent = f"fma.rn.f32 $0, $1, {_ptx(factor)}, {_ptx(offset)}; "
    else:
        exponent = f"mul.rn.f32 $0, $1, {_ptx(factor)}; "
    if (factor, offset) == (1.0, 0.0):
        return _inline("ex2.approx.ftz.f32 $0, $1;", x)
    return _inline(exponent + "ex2.approx.ftz.f32 $0, $0;", x)


def multiply_add(x: Float[Array, "*shape"], factor: float, y: Float[Array, "*small"]) -> Float[Array, "*shape"]:
    """factor * x + y, rounded once where one instruction does it; XLA's Triton backend never fuses the two itself."""
    if _interpreted.get():
        return x * factor + y
    return _inline(f"fma.rn.f32 $0, $1, {_ptx(factor)}, $2;", x, jnp.broadcast_to(y, x.shape))


def _ptx(number: float) -> str:
    """A float32 literal."""
    return f"0f{np.float32(number).view(np.uint32):08X}"


def _inline(instructions: str, *args: Array) -> Array:
    """One or more PTX instructions on each number of float32 arrays of one shape."""
    constraints = ",".join(["=f", *["f"] * len(args)])
    result = jax.ShapeDtypeStruct(args[0].shape, jnp.float32)
    return plt.elementwise_inline_asm(
        instructions, args=args, constraints=constraints, pack=1, result_shape_dtypes=[result]
    )[0]


class Arithmetic(NamedTuple):
    """exp2(x, factor, offset) and multiply_add(x, factor, y), as the functions of this module are for Triton."""

    exp2: Callable[[Array, float, float], Array]
    multiply_add: Callable[[Array, float, Array], Array]


TRITON = Arithmetic(exp2, multiply_add)
# Which fuses by itself.
MOSAIC = Arithmetic(lambda x, factor, offset: jnp.exp2(x * factor + offset), lambda x, factor, y: x * factor + y)


class Softmax(NamedTuple):
    """Softmax by base-2 exponentials with the errors of natural ones.

    The highest logit is subtracted before the change of base, so that what all logits have in common is gone before
    anything is rounded again. Weights are 2**-shift of what they are, so that a sum of values near the largest of their
    dtype stays finite where their average is.

    multiplier: makes logits of products; None where products are the logits as they are.
    unit: natural logits per logit.
    shift: see `weight_shift`.
    is_exact: shifts by a product after the exponential: in the exponent it costs nothing, but rounds weights at 1e-6.
    """

    multiplier: float | None
    unit: float
    shift: int
    is_exact: bool
    arithmetic: Arithmetic

    @classmethod
    def of(cls, scale: float, has_bias: bool, tokens: int, dtype: Any, arithmetic: Arithmetic = TRITON) -> Softmax:
        """scale: of the products. tokens: the most whose values are added up. dtype: of the values."""
        # The largest product must be the largest logit, and LARGE less any logit many orders of magnitude.
        needs_product = has_bias or scale < 1e-6
        unit = 1.0 if needs_product else scale
        shift = weight_shift(tokens, dtype)
        return cls(scale if needs_product else None, unit, shift, dtype == jnp.float32, arithmetic)

    def logits(self, products: Array, bias: Array | None) -> Array:
        if self.multiplier is None:
            return products
        if bias is None:
            return products * self.multiplier
        return self.arithmetic.multiply_add(products, self.multiplier, bias)

    def log_sum_exp(self, top: Array, log_total: Array) -> Array:
        """Natural; -inf where `top` is LARGE, which stands for nothing that was seen."""
        return jnp.where(top >= LARGE, -jnp.inf, top * self.unit + log_total)

    def probabilities(self, below_top: Array, log_total: Array) -> Array:
        """Weights over their sum. Neither number was rounded to the size of the other, as their sum in lse is."""
        factor = self.unit * LOG2_E
        return self.arithmetic.exp2(self.arithmetic.multiply_add(below_top, factor, log_total * -LOG2_E), 1.0, 0.0)

    def weights(self, below_top: Array) -> Array:
        """below_top: logits less the highest so far."""
        if self.is_exact:
            return self.decay(below_top) * 0.5**self.shift
        return self.arithmetic.exp2(below_top, self.unit * LOG2_E, -float(self.shift))

    def decay(self, below_top: Array) -> Array:
        """What becomes of a sum when the highest logit changes: below_top is the old one less the new one."""
        return self.arithmetic.exp2(below_top, self.unit * LOG2_E, 0.0)

    def log_total(self, total: Array) -> Array:
        """Natural logarithm of the sum of the weights, as if they had not been made smaller."""
        return jnp.log(total * 2.0**self.shift)


def barrier() -> None:
    """What the threads of this program wrote before, all of them see after."""
    if not _interpreted.get():
        plt.debug_barrier()


def next_power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def running_count(mask: Array) -> Array:
    """How many of `mask` [n] are set up to and including each place, int32."""
    return jnp.cumsum(mask.astype(jnp.int32), dtype=jnp.int32)


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def unsupported_operand(argument: str, x: Array) -> str | None:
    """Why rows of `x` [..., D] cannot be multiplied in a kernel; None where they can."""
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"{argument} must be bfloat16, float16 or float32, got {x.dtype}"
    if not is_power_of_two(x.shape[-1]) or not 16 <= x.shape[-1] <= 256:
        return f"the head dim must be a power of two in [16, 256], got {x.shape[-1]}"
    return None


def layer_index(layer: Any, whole: Any) -> Array:
    """In a kernel: the number in `layer` [1], kept inside `whole` [L, ...]; a wild one would make a wild address."""
    return jnp.clip(layer[0], 0, whole.shape[0] - 1)


def heads_as_rows(q: Float[Array, "B N D"], kv_heads: int) -> Float[Array, "B K rows D"]:
    """The query heads of each KV head, padded to as many as a matrix product takes: a power of two of at least 16."""
    batch, heads, dim = q.shape
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, dim)
    return pad_to_multiple(grouped, 2, max(LEAST_ROWS, next_power_of_two(heads // kv_heads)))


def pad_to_multiple(x: Array, axis: int, multiple: int, fill: int | float = 0) -> Array:
    """`x` with `fill` after its end on `axis`, up to a whole multiple."""
    short = -x.shape[axis] % multiple
    if short == 0:
        return x
    return jnp.pad(x, [(0, short if a == axis else 0) for a in range(x.ndim)], constant_values=fill)


def per_head(values: Array, group: int) -> Array:
    """[queries] -> [queries * group]: the query heads of a group share it."""
    return jnp.broadcast_to(values[:, None], (values.shape[0], group)).reshape(-1)
