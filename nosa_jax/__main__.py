"""`python -m nosa_jax`, the same as `nosa`."""

import sys

from nosa_jax.cli import main

sys.exit(main())
