"""The `bench` command: times this connector beside sglang's built-in transports.

``transfers`` moves embeddings between two processes, ``servers`` sends requests to whole sglang servers.
"""
