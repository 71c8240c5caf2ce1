"""The command `nosa`: train, generate, measure locality, plan memory, and a demo of all of it.

Needs the extra `cli`: pip install ".[cli]" in a checkout.
"""

from nosa_jax.cli.app import main

__all__ = ["main"]
