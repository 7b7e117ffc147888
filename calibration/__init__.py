"""Ahead of time: watch the model on real frames and decide scales and compute types."""
