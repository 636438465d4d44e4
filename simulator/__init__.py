"""The cluster on virtual time: traces, clock and reports around the real policy and worker model."""
