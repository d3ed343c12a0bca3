"""Small commands of `python -m sglang_mm_conn`; the large one has a folder of its own (demo)."""
