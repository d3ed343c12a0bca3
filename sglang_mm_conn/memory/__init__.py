"""Memory that somebody else may write: shared segments and the pool of blocks made of them."""
