"""SFTMix's parts for a script of one's own: the fused next-token loss, training dynamics, and the pairs of an epoch.

``patch_lm_head(model)`` gives any causal LM the loss straight from hidden states when labels are passed;
``TrainingDynamicsCallback`` takes the scores of every example from any ``Trainer`` as it trains; ``PairDataset``,
``PairSampler`` and ``PairCollator`` make SFTMix's batches for any data loader.
"""

from __future__ import annotations

from sftmix.transformers.callback import TrainingDynamicsCallback
from sftmix.transformers.head import patch_lm_head, unpatch_lm_head
from sftmix.transformers.pairs import PairCollator, PairDataset, PairSampler

__all__ = [
    "PairCollator",
    "PairDataset",
    "PairSampler",
    "TrainingDynamicsCallback",
    "patch_lm_head",
    "unpatch_lm_head",
]
