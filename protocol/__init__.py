"""The contract of both ends: messages, frames, distributions, randomness, rounds, limits, errors and the manifest.

Knows NumPy and msgpack. Knows no socket, model, clock or command line.
"""
