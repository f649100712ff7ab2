"""PREDICTED: bytes and seconds of a program, from sizes alone."""
