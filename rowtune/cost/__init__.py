"""PREDICTED: bytes and seconds of a program, from recordings of its segments."""
