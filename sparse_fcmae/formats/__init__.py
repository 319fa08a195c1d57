"""Checkpoints of this package and of others: names, shapes, files."""
