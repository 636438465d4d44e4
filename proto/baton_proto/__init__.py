"""The wire format between routers and workers: stubs generated from worker.proto, and codecs."""
