"""An encoder that takes longer for each image, without using a processor: what a slower accelerator does."""

import asyncio
from typing import Any

from cpu_bed.hooks import around

_COMPUTE = "sglang.srt.disaggregation.encoder.server.MMEncoder._compute_direct_embedding"


def sleep_before_the_model(seconds: str) -> None:
    """``seconds`` for each image. The encoder's lock is held meanwhile, so that images wait for each other."""
    try:
        wait = float(seconds)
    except ValueError:
        wait = -1.0
    if wait < 0:
        raise SystemExit(f"CPU_BED_ENCODE_SLEEP={seconds!r}: must be a number of seconds")

    async def compute(original: Any, self: Any, ctx: Any, **kwargs: Any) -> Any:
        if not ctx.is_health_check:
            await asyncio.sleep(wait * ctx.num_items)
        return await original(self, ctx, **kwargs)

    around("CPU_BED_ENCODE_SLEEP", _COMPUTE, compute)
