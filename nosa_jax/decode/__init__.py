"""Running a model with a KV cache: prefill, extend and decode steps, sampling, and generation on top of them.

Users find what they need under `nosa_jax`; scripts that measure or change a step find its parts here.
"""

from nosa_jax.decode.checks import Prompt
from nosa_jax.decode.generation import GREEDY, Generation, Step, generate, stream
from nosa_jax.decode.program import COMPILER_OPTIONS
from nosa_jax.decode.prompt import extend, jit_extend, prefill
from nosa_jax.decode.request import RECORDS, room_for
from nosa_jax.decode.sampling import Sampling, row_keys, sample
from nosa_jax.decode.step import StepOutput, decode_step, jit_decode_step, run_step

__all__ = [
    "COMPILER_OPTIONS",
    "GREEDY",
    "RECORDS",
    "Generation",
    "Prompt",
    "Sampling",
    "Step",
    "StepOutput",
    "decode_step",
    "extend",
    "generate",
    "jit_decode_step",
    "jit_extend",
    "prefill",
    "room_for",
    "row_keys",
    "run_step",
    "sample",
    "stream",
]
