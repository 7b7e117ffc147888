"""Which spans stay in the context: pure functions of the span list."""
