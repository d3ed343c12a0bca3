"""Lets an unmodified sglang run on a CPU-only torch, for tests and the demo."""
