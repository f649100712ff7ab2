"""The command line: parse, call one function, render. One file a command.

app         the commands, and what an error becomes
options     the flags that several commands share
screen      where words, tables and JSON go
charts      bars and the scatter, drawn with characters
"""
