"""ONNX graphs of the model parts, authored node by node over the checkpoint's own weights."""
