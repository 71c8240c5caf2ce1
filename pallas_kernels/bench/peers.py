"""Other people's attention on the same arrays, in the same run: dense attention of cuDNN, and FLA's NSA kernel.

Neither takes a bias, and both are asked for rows of a single document whose queries are all of its tokens only, but for
cuDNN the last of them: without the mask, which it does not know.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels import KernelUnsupportedError
from pallas_kernels.bench import counts, work
from pallas_kernels.bench.counts import Floor
from pallas_kernels.bench.work import Work
from pallas_kernels.device import current_device

CUDNN, FLA = "cudnn_dense", "fla_nsa"
NAMES = (CUDNN, FLA)


def missing() -> dict[str, str]:
    """Peers that cannot run on this machine, and why."""
    device = current_device()
    if not device.is_gpu:
        return dict.fromkeys(NAMES, f"it needs a GPU, the default device is {device.platform!r}")
    absent = [name for name in ("torch", "fla") if importlib.util.find_spec(name) is None]
    return {FLA: f"not installed: {', '.join(absent)} (pip install flash-linear-attention)"} if absent else {}


def versions() -> dict[str, str]:
    """Returns the versions of the packages that the peers come from, where installed."""
    found = {}
    for package in ("torch", "triton", "fla-core", "flash-linear-attention", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def require_whole_rows(inputs: dict[str, Any]) -> None:
    """Raises KernelUnsupportedError where a plain causal mask is another one than ours."""
    every, positions = np.arange(inputs["k"].shape[2]), inputs["positions"]
    whole = positions is None or all(np.array_equal(row, every) for row in np.asarray(positions))
    if inputs["first_block"] is not None or not whole:
        raise KernelUnsupportedError("it is compared on whole rows of one document only")


def are_last_tokens(inputs: dict[str, Any]) -> bool:
    """Whether the queries are the last tokens of their rows, but not all: rows behind a cache."""
    (length, tokens), positions = (inputs["q"].shape[1], inputs["k"].shape[2]), inputs["positions"]
    last = np.arange(tokens - length, tokens)
    is_last = positions is not None and all(np.array_equal(row, last) for row in np.asarray(positions))
    return inputs["first_block"] is None and length < tokens and is_last


def cudnn(inputs: dict[str, Any], *, gradient: bool) -> Work:
    """Dense causal attention through `jax.nn.dot_product_attention`; nothing to compare with, it attends to more.

    Queries behind a cache see all tokens: cuDNN's causal mask starts with the first one.
    """
    is_causal = not are_last_tokens(inputs)
    if is_causal:
        require_whole_rows(inputs)
    arrays = {"q": inputs["q"], "k": jnp.swapaxes(inputs["k"], 1, 2), "v": jnp.swapaxes(inputs["v"], 1, 2)}

    def attend(q: Float[Array, "B T N D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K D"]) -> Any:
        return jax.nn.dot_product_attention(q, k, v, is_causal=is_causal, implementation="cudnn")

    def forward_and_backward(dout: Float[Array, "B T N D"], **arrays: Any) -> Any:
        out, pull = jax.vjp(lambda x: attend(**x), arrays)
        return out, pull(dout)

    def call(*, implementation: str, **arrays: Any) -> Any:
        return forward_and_backward(**arrays) if gradient else attend(**arrays)

    floor = counts.dense_attention(inputs, gradient=gradient)
    if gradient:
        arrays["dout"] = jax.random.normal(jax.random.key(1), inputs["q"].shape, inputs["q"].dtype)
    return Work(arrays, call, floor)


class TorchWork(NamedTuple):
    """run(set number): one call. sample: for `timing.measure`. comparable: of the checked call."""

    sample: Callable[[int], float]
    comparable: Callable[[], dict[str, Any]]
    floor: Floor
    truth: Work


def fla_nsa(inputs: dict[str, Any], *, block_size: int, gradient: bool, copies: int) -> TorchWork:
    """`fla.ops.nsa.parallel_nsa` on the same selection, its gates left out, timed by CUDA events.

    Written for fla-core 0.6: q [B, T, N, D], k and v [B, T, K, D], block_indices [B, T, K, J] int64, -1 passes over.
    It also mean-pools k and v, which costs it the time of reading them.
    """
    require_whole_rows(inputs)
    if inputs["block_ids"] is None:
        raise KernelUnsupportedError("it needs block ids, this case is dense")
    torch, nsa = importlib.import_module("torch"), importlib.import_module("fla.ops.nsa")
    ours = work.attention(inputs | {"bias": None}, block_size=block_size, gradient=gradient)
    checked = ours.checked or ours.inputs

    def to_torch(x: Any) -> Any:
        """Through the host: no assumption about who owns what on the device."""
        x = np.array(x)
        if x.dtype == jnp.bfloat16:
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).cuda()
        return torch.from_numpy(x).cuda()

    q = to_torch(inputs["q"])
    k, v = (to_torch(inputs[name]).transpose(1, 2).contiguous() for name in ("k", "v"))
    block_indices = to_torch(inputs["block_ids"]).permute(0, 2, 1, 3).contiguous().long()
    sets = [tuple(x.clone().requires_grad_(gradient) for x in (q, k, v)) for _ in range(copies)]
    dout = to_torch(ours.inputs["dout"]) if gradient else None

    def call(learned: Any, dout: Any) -> Any:
        out = nsa.parallel_nsa(
            *learned, block_indices=block_indices, block_counts=block_indices.shape[-1], block_size=block_size
        )
        return (out, *torch.autograd.grad(out, learned, dout)) if gradient else (out,)

    def sample(calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for number in range(calls):
            call(sets[number % len(sets)], dout)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def comparable() -> dict[str, Any]:
        with_gradients = call(sets[0], to_torch(checked["dout"]) if gradient else None)
        out, *grads = (x.detach().float().cpu().numpy() for x in with_gradients)
        lse = np.zeros(out.shape[:3], np.float32)  # it returns none
        if not gradient:
            found = ours.comparable((out, lse))
        else:
            heads_first = [np.swapaxes(x, 1, 2) for x in grads[1:]]
            found = ours.comparable({"out": out, "lse": lse, "q": grads[0], "k": heads_first[0], "v": heads_first[1]})
        del found["lse"]
        return found

    return TorchWork(sample, comparable, ours.floor, ours)
