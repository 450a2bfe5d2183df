"""Connections of devices: ROUTER socket, keys, limits."""
