"""``SFTMixPlugin``: what axolotl calls while it reads its file and builds its trainer."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from sftmix.axolotl.section import SFTMixSection


class SFTMixPlugin(BasePlugin):  # type: ignore[misc]
    """SFTMix in the place of axolotl's next-token loss, where the file has a section ``sftmix:``.

    Raises ``ValueError`` naming the option for what cannot stand beside it.
    """

    def register(self, cfg: Any) -> None:
        """Find out now whether the trainer can be imported: axolotl would go on without one, next-token only."""
        try:
            import sftmix.axolotl.trainer  # noqa: F401
        except ImportError as error:
            raise RuntimeError(
                f"sftmix: the trainer cannot be imported beside this axolotl: {error}"
            ) from error

    def get_input_args(self) -> str:
        return "sftmix.axolotl.section.SFTMixArgs"

    def get_training_args(self, cfg: Any) -> dict[str, Any] | None:
        """Whole epochs: axolotl's own number of steps ends in the middle of the last one."""
        return {"max_steps": cfg.max_steps or -1} if cfg.sftmix else None

    def get_trainer_cls(self, cfg: Any) -> Any:
        """The trainer, with the section: axolotl's arguments have its fields only if they were not imported before."""
        if not cfg.sftmix:
            return None
        from sftmix.axolotl.trainer import AxolotlSFTMixTrainer

        section = SFTMixSection(**dict(cfg.sftmix))
        return type("AxolotlSFTMixTrainer", (AxolotlSFTMixTrainer,), {"section": section})

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Raise ``ValueError`` where another plugin's trainer came first: axolotl takes one and says nothing."""
        from sftmix.axolotl.trainer import AxolotlSFTMixTrainer

        if cfg.sftmix and not isinstance(trainer, AxolotlSFTMixTrainer):
            raise ValueError(
                f"plugins: expected no other plugin with a trainer, got {type(trainer).__module__}."
                f"{type(trainer).__name__}"
            )
