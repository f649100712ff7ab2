"""rowtune: train convolutional networks that do not fit, exactly, under a memory budget."""

__version__ = "0.1.0"
