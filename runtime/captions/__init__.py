"""Captions on disk: WebVTT for players, JSONL for programs."""
