"""TensorRT plans: which builder, which profiles, and the compilation itself, part by part."""
