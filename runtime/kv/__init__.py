"""Pages, spans and positions of the KV cache: integers only."""
