"""The portable engine: the loss in plain torch, a chunk of rows or a tile of logits at a time; what a CPU runs.

statistics.py: forward only · gradients.py: with gradients, made at once or again · rows.py: the arithmetic of rows ·
layer.py: products in a dtype the device has · scratch.py: sizes
"""

from .gradients import gradients, scaled, statistics_with_gradients
from .statistics import statistics

__all__ = ["gradients", "scaled", "statistics", "statistics_with_gradients"]
