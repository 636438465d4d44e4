"""Engines behind one interface: vLLM's, and a mock for scale and timing tests."""
