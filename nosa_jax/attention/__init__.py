"""NOSA attention: importance head, layout of rows, selection and the layer that wires the ops together."""
