"""Runs at every interpreter start (cpu_bed.pth), so it only puts two import finders in place.

Nothing heavier than the standard library may be imported here.
"""

import sys

from cpu_bed.torchvision_schema import TorchvisionFinder
from cpu_bed.triton_stub import TritonFinder

sys.meta_path.insert(0, TorchvisionFinder())
sys.meta_path.append(TritonFinder())  # last, so that an installed triton wins
