"""The language rank's side of a transfer: it offers blocks, copies rows out of them, hands embeddings over."""
