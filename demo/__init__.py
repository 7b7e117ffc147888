"""The demo world: its scenes and videos, the model trained on it, and the model's evaluation."""
