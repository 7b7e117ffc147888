"""Video sources, capture, and cutting into chunks."""
