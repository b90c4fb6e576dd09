"""A plugin of somebody else that has a trainer of its own."""

from __future__ import annotations

from typing import Any

from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.integrations.base import BasePlugin


class OtherTrainer(AxolotlTrainer):  # type: ignore[misc]
    """axolotl's, under another name."""


class OtherPlugin(BasePlugin):  # type: ignore[misc]
    def get_trainer_cls(self, cfg: Any) -> Any:
        return OtherTrainer
