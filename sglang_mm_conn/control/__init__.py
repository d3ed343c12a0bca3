"""The control path: one connection per peer pair, owned by one thread per process."""
