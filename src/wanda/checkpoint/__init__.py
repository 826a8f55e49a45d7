"""Checkpoints on disk: lazy reading, crash-safe writing, the packed sparse format."""
