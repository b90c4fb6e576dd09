"""SFTMix's loss: next-token plus Mixup from hidden states, without storing full-vocabulary logits.

>>> from sftmix_kernels import sftmix_loss
"""

import sys

# `python -m sftmix_kernels` says its first line before torch's import, which takes seconds and may fail: __main__.py.
if sys.orig_argv[1:3] != ["-m", __name__]:
    from .around_head import adapt_head
    from .doctor.examine import examine
    from .doctor.findings import Finding
    from .footprint import LossBytes, loss_bytes
    from .functional import linear_cross_entropy, sftmix_loss, token_stats
    from .hardware import ProductSupport, product_factor, product_support, time_product
    from .head import LossHead, LossOptions, StatsOptions
    from .reference import SFTMixLoss, TokenStats

__version__ = "0.1.0"
__all__ = [
    "Finding",
    "LossBytes",
    "LossHead",
    "LossOptions",
    "ProductSupport",
    "SFTMixLoss",
    "StatsOptions",
    "TokenStats",
    "adapt_head",
    "examine",
    "linear_cross_entropy",
    "loss_bytes",
    "product_factor",
    "product_support",
    "sftmix_loss",
    "time_product",
    "token_stats",
]


def __dir__() -> list[str]:
    """The public names, without the modules that hold them."""
    return sorted(name for name in globals() if name in __all__ or name.startswith("__"))
