"""The rivals on the same engine: how fast they decode, how well they answer, and both in one picture."""
