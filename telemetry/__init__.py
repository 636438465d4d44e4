"""Metrics and logs of every process; the only package that talks to Prometheus."""
