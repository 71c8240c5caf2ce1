"""`python -m nosa_jax.cli`, the same as `nosa`."""

import sys

from nosa_jax.cli.app import main

sys.exit(main())
