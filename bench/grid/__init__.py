"""Decoding speed with drafting against the target alone, over loopback and over a grid of emulated links."""
