"""Owns the memory of transfers: shared segments, the pool of blocks, results, and copies between them."""
