"""Sessions over an executor that is sent whole prompts and keeps its own K/V cache."""
