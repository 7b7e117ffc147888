"""The executor that runs a bundle's TensorRT plans."""
