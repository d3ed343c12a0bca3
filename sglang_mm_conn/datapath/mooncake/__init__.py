"""The Mooncake data path: RDMA or TCP writes between hosts, both of its halves.

``engine``: how engines are made. ``writer``, ``staging``, ``semaphore``: the encoder's half. ``exposure``,
``revocation``: the language rank's half.
"""
