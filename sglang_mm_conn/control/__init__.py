"""Owns the control path: one connection per pair of processes, and one thread per process that serves them."""
