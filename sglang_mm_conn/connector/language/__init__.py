"""Owns the language rank's side of a transfer: offers blocks, copies rows out of them, hands embeddings over."""
