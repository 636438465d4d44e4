"""The decode leg of a worker."""
