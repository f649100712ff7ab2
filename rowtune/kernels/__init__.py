"""Tensor arithmetic that operators run: autograd functions and constants. Nothing here knows a graph."""
