"""Memory for keys and values, and for the whole process."""
