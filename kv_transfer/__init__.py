"""KV blocks between workers: the NIXL connector, KV handles and leases."""
