"""Triton kernels of the loss: a forward that stores no logits and a backward that recomputes them slice by slice.

tiles.py: the one main loop and what every kernel shares · configs.py: tile table · forward.py and stats.py: the
forward's two kernels · recompute.py: the backward · row_terms.py: its numbers of rows · rows.py and row_kernels.py:
the same, and terms.py, in a launch each · stored.py and stored_kernel.py:
the other schedule · tokens.py: logits of given columns · products.py: library products
"""

from .configs import Tile, choose_tile, current_arch
from .forward import fused_forward
from .products import scaled
from .recompute import fused_backward
from .rows import coefficients, finish, upstream_of
from .stored import statistics_with_gradients

statistics, gradients = fused_forward, fused_backward  # as the operators call an engine's

__all__ = [
    "Tile",
    "choose_tile",
    "coefficients",
    "current_arch",
    "finish",
    "fused_backward",
    "fused_forward",
    "gradients",
    "scaled",
    "statistics",
    "statistics_with_gradients",
    "upstream_of",
]
