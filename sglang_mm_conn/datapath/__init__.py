"""Owns the data paths, which write a window's bytes into the receiver's blocks: one interface, two implementations."""
