"""A front for devices and replicas of the target behind it, on one or several machines."""
