"""Owns the data paths, which write a window's bytes into the receiver's blocks: interface and table."""
