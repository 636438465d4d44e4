"""The best static split of GPUs for a trace."""
