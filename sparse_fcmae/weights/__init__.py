"""Checkpoints of any library, read and converted."""
