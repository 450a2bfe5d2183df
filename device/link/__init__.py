"""The DEALER socket: keys, byte counts, probes."""
