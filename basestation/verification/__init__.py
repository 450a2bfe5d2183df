"""Which drafted tokens are accepted, and what comes next."""
