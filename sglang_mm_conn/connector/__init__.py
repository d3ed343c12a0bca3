"""Owns the endpoints: each connects a core with memory, data paths and control sockets, and runs its threads.

- ``encoder/``: ``endpoint`` is the encoder's side. It composes ``registration`` (attaches the memory of language
  ranks), ``links`` (the open data links), ``source`` (embeddings that were handed over), ``transfer`` (makes the data
  calls) and ``actions`` (carries out what the core asks for).
- ``language/``: ``endpoint`` is the language rank's side. It composes ``encoder_directory`` (connections to encoders),
  ``sessions`` (how the rank registers its pool) and ``results`` (copies rows out). ``follower`` is the endpoint of a
  rank that reads what its leader receives.
- ``args``, ``metadata``, ``runtime``: arguments of a manager, the encoding of metadata, the clock, threads and sockets
  that an endpoint uses.
"""
