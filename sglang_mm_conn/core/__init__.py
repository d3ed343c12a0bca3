"""Pure logic: no IO, no torch, no threads; time comes in as an argument (seconds, any monotonic origin)."""
