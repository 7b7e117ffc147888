"""What a person sees while a stream runs: captions, a status line, a preview window."""
