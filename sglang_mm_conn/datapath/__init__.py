"""The data path: how a window's bytes get into the receiver's blocks. One interface, two implementations."""
