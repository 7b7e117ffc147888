"""Benchmarks of a bundle: time per chunk, endurance, concurrency."""
