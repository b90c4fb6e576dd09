"""SFTMix for axolotl, from YAML alone: ``plugins: [sftmix.axolotl.SFTMixPlugin]`` and a section ``sftmix:``.

Nothing of axolotl is imported before the plugin is asked for: axolotl goes on without a plugin that raises
``ImportError``, with a line in its log, and would train next-token only.
"""

from __future__ import annotations

from typing import Any

__all__ = ["SFTMixPlugin"]


def __getattr__(name: str) -> Any:
    if name == "SFTMixPlugin":
        from sftmix.axolotl.plugin import SFTMixPlugin

        return SFTMixPlugin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
