"""Model configuration, weight names, and lazy checkpoint reading."""
