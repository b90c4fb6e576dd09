"""Triton kernels of the loss: a forward that stores no logits and a backward that recomputes them slice by slice.

tiles.py: the one main loop and what every kernel shares · configs.py: tile table · forward.py and stats.py: the
forward's two kernels · recompute.py: the backward · stored.py: the other schedule · products.py: library products
"""

from .configs import Tile, choose_tile, current_arch
from .engine import gradients, statistics
from .forward import fused_forward
from .recompute import fused_backward
from .stats import FusedStats
from .stored import statistics_with_gradients

__all__ = [
    "FusedStats",
    "Tile",
    "choose_tile",
    "current_arch",
    "fused_backward",
    "fused_forward",
    "gradients",
    "statistics",
    "statistics_with_gradients",
]
