"""An image of one size kills every encoder that loads it, as a fault in a decoder or in a model could."""

import logging
import os
import signal
from typing import Any

from cpu_bed.hooks import around

_LOAD = "sglang.srt.disaggregation.encoder.preprocessor.EncoderPreprocessor._load_single_item"

logger = logging.getLogger(__name__)


def kill_encoders_by(size: str) -> None:
    """``size``: width and height in pixels, such as "61x67"."""
    width, x, height = size.partition("x")
    if not (x and width.isdecimal() and height.isdecimal()):
        raise SystemExit(f"CPU_BED_POISON={size!r}: must be a width and a height such as 61x67")
    deadly = (int(width), int(height))

    def load(original: Any, *args: Any, **kwargs: Any) -> Any:
        image = original(*args, **kwargs)
        if getattr(image, "size", None) == deadly:
            logger.critical("CPU bed: an image of %s pixels kills this encoder", size)
            os.kill(os.getpid(), signal.SIGKILL)
        return image

    around("CPU_BED_POISON", _LOAD, load)
