"""EXECUTED again: the calls that a rows segment made once, as straight-line code."""
