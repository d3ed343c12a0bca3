"""Data paths: how a window's bytes get into the receiver's blocks. ``base``: the interface; ``factory``: the table."""
