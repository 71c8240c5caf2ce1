"""Short scripts to start from: only public names of `nosa_jax`, each well under a minute on a CPU."""
