"""The study: a real dense model continued with every variant, its quality beside the locality of its selections."""
