"""The contract of both ends: messages, frames, distributions, randomness, rounds.

Knows NumPy and msgpack. Knows no socket, no model and no clock.
"""
