"""A model of hashes instead of tensors, and a stream of plain token lists to compare with."""
