"""Metrics, the fleet page and what `top` shows."""
