"""Notebooks for those who compare selections: each a script in jupytext's percent form, and the .ipynb made from it."""
