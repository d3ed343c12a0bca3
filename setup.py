"""Packaging of sglang-mm-conn: the sglang plugin and its command line."""

from setuptools import find_packages, setup

setup(
    name="sglang-mm-conn",
    version="0.1.0",
    description="Multimodal embeddings from an sglang encoder server to a language server: paged, one-sided, resumable",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["sglang_mm_conn", "sglang_mm_conn.*"]),
    package_data={"sglang_mm_conn": ["py.typed"]},
    # sglang depends on these, and on what else is imported (torch, numpy, requests, fastapi, uvicorn). No version is
    # asked for, so installing the plugin cannot move one of its pins.
    install_requires=["msgspec", "pyzmq"],
    extras_require={
        "sglang": ["sglang>=0.5.23,<0.5.24"],
        "mooncake": ["mooncake-transfer-engine"],
        "demo": ["rich", "requests", "pillow", "numpy", "av"],
        "bench": ["rich", "matplotlib", "numpy", "requests", "pillow"],
        "test": [
            "pytest",
            "hypothesis",
            "ruff",
            "mypy",
            "rich",
            "requests",
            "pillow",
            "numpy",
            "matplotlib",
            "av",
            "decord2",
        ],
    },
    entry_points={"sglang.srt.plugins": ["conn_multimodal = sglang_mm_conn.sglang_plugin:register"]},
)
