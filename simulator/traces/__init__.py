"""Recorded and generated loads: reading, writing, cutting, making up."""
