"""Pure logic: no IO, no torch, no threads. Callers pass the time in, as seconds of any one monotonic clock."""
