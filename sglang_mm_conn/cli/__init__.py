"""Small commands of `python -m sglang_mm_conn`; the large ones have folders of their own (demo, bench)."""
