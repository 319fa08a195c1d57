"""The network, written out."""
