"""Owns the Mooncake data path: RDMA or TCP writes between hosts.

``engine`` makes engines. ``writer``, ``staging`` and ``semaphore`` are the encoder's half, ``exposure`` and
``revocation`` the language rank's half.
"""
