"""The bed's sglang plugin: applies what these environment variables ask for, and nothing by default.

CPU_BED_FORBID_BUILTIN_TRANSPORT=1  sglang's own embedding transports raise when used (see forbid.py)
CPU_BED_HOST_POOL=1               sglang's Mooncake embedding transport receives into host memory (see host_pool.py)
CPU_BED_PREFILL_DECODE=1          prefill and decode servers run without an accelerator (see prefill_decode.py)
CPU_BED_MEDIA_METADATA=1          a colocated server sees video and audio as an encoder does (see media_metadata.py)
CPU_BED_PIN_NOTHING=1             LoRA runs without an accelerator (see pinned.py)
CPU_BED_POISON=61x67              an image of this size kills every encoder that loads it (see poison.py)
CPU_BED_ENCODE_SLEEP=0.1          an encoder takes so many seconds more for each image (see slow_encoder.py)
"""

import os


def register() -> None:
    if _asked("CPU_BED_FORBID_BUILTIN_TRANSPORT"):
        from cpu_bed.forbid import forbid_builtin_transport

        forbid_builtin_transport()
    if _asked("CPU_BED_HOST_POOL"):
        from cpu_bed.host_pool import receive_into_host_memory

        receive_into_host_memory()
    if _asked("CPU_BED_PREFILL_DECODE"):
        from cpu_bed.prefill_decode import do_without_accelerator

        do_without_accelerator()
    if _asked("CPU_BED_MEDIA_METADATA"):
        from cpu_bed.media_metadata import use_the_encoders_metadata

        use_the_encoders_metadata()
    if _asked("CPU_BED_PIN_NOTHING"):
        from cpu_bed.pinned import pin_nothing

        pin_nothing()
    if size := os.environ.get("CPU_BED_POISON"):
        from cpu_bed.poison import kill_encoders_by

        kill_encoders_by(size)
    if seconds := os.environ.get("CPU_BED_ENCODE_SLEEP"):
        from cpu_bed.slow_encoder import sleep_before_the_model

        sleep_before_the_model(seconds)


def _asked(variable: str) -> bool:
    value = os.environ.get(variable, "0")
    if value not in ("0", "1"):
        # SystemExit, because sglang logs any other exception of a plugin and goes on without it.
        raise SystemExit(f"{variable}={value!r}: must be 0 or 1")
    return value == "1"
