"""The prefill leg of a worker."""
