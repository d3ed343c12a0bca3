"""The two ends put together: cores, memory, data paths and control sockets, with the threads that drive them."""
