"""Measuring how fast a worker is: the body of ``baton profile``."""
