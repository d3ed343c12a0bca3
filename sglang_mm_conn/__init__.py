"""Multimodal embeddings between sglang servers: paged, registered memory and transfers that resume."""

__version__ = "0.1.0"
