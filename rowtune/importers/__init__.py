"""Sources of graphs: a torch module, a .pt2 file, an .onnx file, the zoo."""
