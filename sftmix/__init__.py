"""SFTMix: instruction tuning with a Mixup regulariser between confident and unconfident examples.

This package is the recipe (data, confidence, training, evaluation); the loss itself lives in
``sftmix_kernels``. Importing ``sftmix`` is cheap: each stage's module is imported where it is used.
"""

from __future__ import annotations

__version__: str  # looked up when first asked: importlib.metadata takes longer than everything else here
__all__ = ["__version__"]


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import metadata

    try:
        return metadata.version("sftmix")
    except metadata.PackageNotFoundError:  # a source tree that was never installed
        from sftmix_kernels import __version__ as kernels_version

        return kernels_version
