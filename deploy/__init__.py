"""The composition root: configuration, Serve application, replicas, command line, manifests."""
