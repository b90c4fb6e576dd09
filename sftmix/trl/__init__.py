"""SFTMix for TRL: ``SFTMixTrainer`` is ``SFTTrainer`` on pairs of confident and unconfident examples.

``from sftmix.trl import SFTMixConfig, SFTMixTrainer``; the package trl is needed (``pip install "sftmix[trl]"``).
"""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("trl") is None:
    raise ImportError('sftmix.trl needs the package trl, which is missing: pip install "sftmix[trl]"')

from sftmix.trl.config import SFTMixConfig
from sftmix.trl.trainer import SFTMixTrainer

__all__ = ["SFTMixConfig", "SFTMixTrainer"]
