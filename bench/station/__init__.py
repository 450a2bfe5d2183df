"""What one base station serves: capacity, churn, forward passes, shared prefixes."""
