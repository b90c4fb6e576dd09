"""SFTMix: instruction tuning with a Mixup regulariser between confident and unconfident examples.

This package is the recipe (data, confidence, training, evaluation); the loss itself lives in
``sftmix_kernels``. Importing ``sftmix`` is cheap: each stage's module is imported where it is used.
"""

from __future__ import annotations

from importlib import metadata


def _find_version() -> str:
    try:
        return metadata.version("sftmix")
    except metadata.PackageNotFoundError:  # a source tree that was never installed
        from sftmix_kernels import __version__ as kernels_version

        return kernels_version


__version__ = _find_version()
__all__ = ["__version__"]
