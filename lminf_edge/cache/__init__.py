"""Streams: their tokens, their cache cells, and checkpoints of both in memory and on disk."""
