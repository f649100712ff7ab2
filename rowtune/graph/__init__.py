"""WHAT is computed: the graph, the row rule of each operator, the cuts between segments."""
