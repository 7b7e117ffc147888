"""Ahead of time: a checkpoint becomes ONNX graphs, TensorRT plans and an engine bundle."""
