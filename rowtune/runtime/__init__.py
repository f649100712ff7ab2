"""EXECUTED: the bands, the line buffers, the nn.Module."""
