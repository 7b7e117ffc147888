"""Executors: where the weights and the K/V pages live."""
