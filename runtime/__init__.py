"""Live: frames in, text out, from a bounded paged KV cache."""
