"""What a type checker and a reader see of an installed package: types of every call, and the public names alone."""

from __future__ import annotations

import pydoc
import re
import shutil
import subprocess
import sys
import sysconfig
import typing
import zipfile
from pathlib import Path

import pytest

import sftmix_kernels
from sftmix_kernels import LossHead

ROOT = Path(__file__).resolve().parents[2]

USER = """
import torch
from typing_extensions import reveal_type
from sftmix_kernels import LossHead, LossOptions, adapt_head, linear_cross_entropy, sftmix_loss, token_stats

head = LossHead(4, 7)
hidden, target, lam = torch.randn(6, 4), torch.randint(7, (6,)), torch.rand(3)
reveal_type(head(hidden))  # Tensor
reveal_type(head(hidden, target))  # SFTMixLoss
reveal_type(head(hidden, target, lam))  # SFTMixLoss
reveal_type(head(hidden, target, lam, mixup_weight=0.5, row_weight=None, ntp_denominator=3))  # SFTMixLoss
reveal_type(head(hidden, target, lam).loss)  # Tensor
reveal_type(head(hidden, target, stats=True))  # TokenStats
reveal_type(head(hidden, target, stats=True, ignore_index=0).entropy)  # Tensor
reveal_type(LossHead.from_linear(head, softcap=30.0))  # LossHead
reveal_type(sftmix_loss(hidden, head.weight, target, lam))  # SFTMixLoss
reveal_type(linear_cross_entropy(hidden, head.weight, target))  # Tensor
reveal_type(token_stats(hidden, head.weight, target))  # TokenStats
reveal_type(adapt_head(head))  # Module
options: LossOptions = {"mixup_weight": 0.5, "impl": "chunked"}
reveal_type(head(hidden, target, **options))  # SFTMixLoss
head(hidden, labels=target)  # error
head(hidden, target, mixup_weight="0.2")  # error
head(hidden, target, label_smooth=0.2)  # error
head(hidden, target, stats=True).loss  # error
head(hidden).loss  # error
unknown: LossOptions = {"mixup": 0.5}  # error
"""
# torch's names that the packages use at all, so that the quick case need not read the whole of torch.
STUBS = {
    "__init__.pyi": "from typing import Any\nfrom . import nn as nn\n"
    "class Tensor:\n    shape: Any\n"
    "class device: ...\nclass dtype: ...\n"
    "def randn(*size: int) -> Tensor: ...\ndef rand(*size: int) -> Tensor: ...\n"
    "def randint(high: int, size: tuple[int, ...]) -> Tensor: ...\ndef __getattr__(name: str) -> Any: ...\n",
    "distributed/__init__.pyi": "class ProcessGroup: ...\n",
    "distributed/device_mesh.pyi": "class DeviceMesh: ...\n",
    "nn/__init__.pyi": "from collections.abc import Callable\nfrom typing import Any\nfrom .. import Tensor\n"
    "class Module:\n    __call__: Callable[..., Any]\n    training: bool\n"
    "    def train(self, mode: bool = True) -> Module: ...\n"
    "class Linear(Module):\n    weight: Tensor\n    bias: Tensor\n    in_features: int\n    out_features: int\n"
    "    def __init__(self, *args: Any, **options: Any) -> None: ...\n"
    "    def forward(self, input: Tensor) -> Tensor: ...\n    def extra_repr(self) -> str: ...\n"
    "def __getattr__(name: str) -> Any: ...\n",
}


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """site-packages as ``pip install -e`` fills them: the build backend's editable wheel of a copy of the project."""
    pytest.importorskip("setuptools")
    project = tmp_path_factory.mktemp("project")
    for name in ("sftmix_kernels", "sftmix"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project / name)
    command = [sys.executable, "-c", "from setuptools.build_meta import build_editable as b; b('out')"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (project / "out").glob("*.whl")
    installed = tmp_path_factory.mktemp("site-packages")
    zipfile.ZipFile(wheel).extractall(installed)
    return installed


def test_an_editable_install_is_a_path_that_type_checkers_follow(editable: Path) -> None:
    """A hook on the import system, which setuptools would write for this layout, they cannot follow."""
    (path,) = editable.glob("*.pth")
    lines = path.read_text(encoding="utf-8").split()
    assert len(lines) == 1 and not list(editable.glob("*finder*"))
    assert (Path(lines[0]) / "sftmix_kernels" / "py.typed").is_file()
    assert (Path(lines[0]) / "sftmix" / "py.typed").is_file()


def environment_of(folder: Path, *paths: str) -> Path:
    """The Python of a new environment whose site-packages are extended by the lines ``paths``."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "paths.pth").write_text("".join(f"{path}\n" for path in paths), encoding="utf-8")
    return folder / "bin" / "python"


@pytest.mark.parametrize("torch_from", ["stubs", pytest.param("installed", marks=pytest.mark.slow)])
def test_a_users_file_is_checked(editable: Path, tmp_path: Path, torch_from: str) -> None:
    """Every reveal_type gives what stands behind it, and every line marked as an error is one, no other."""
    pytest.importorskip("mypy")
    if torch_from == "stubs":
        torch_path = tmp_path / "stubs"
        for name, text in STUBS.items():
            (torch_path / "torch" / name).parent.mkdir(parents=True, exist_ok=True)
            (torch_path / "torch" / name).write_text(text, encoding="utf-8")
        (torch_path / "torch" / "py.typed").touch()
    else:
        torch_path = Path(sysconfig.get_paths()["purelib"])
    (path,) = editable.glob("*.pth")
    python = environment_of(tmp_path / "venv", path.read_text(encoding="utf-8").strip(), str(torch_path))
    user = tmp_path / "user.py"
    user.write_text(USER, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python), "user.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    found: dict[int, str] = {}
    for line in done.stdout.splitlines():
        at = re.match(r"user\.py:(\d+): (?:note: Revealed type is \"(.*)\"|error: )", line)
        if at:
            # "tuple[..., fallback=sftmix_kernels.reference.SFTMixLoss]", "torch._tensor.Tensor"
            found[int(at[1])] = re.split(r"[.=]", at[2].rstrip("]"))[-1] if at[2] else "error"
    lines = enumerate(USER.splitlines(), start=1)
    assert found == {n: line.split("# ")[1] for n, line in lines if "# " in line}, done.stdout + done.stderr


def test_dir_shows_the_public_names_and_help_works() -> None:
    shown = dir(sftmix_kernels)
    assert [name for name in shown if not name.startswith("__")] == sorted(sftmix_kernels.__all__)
    assert "__version__" in shown and "__name__" in shown
    text = pydoc.render_doc(sftmix_kernels, renderer=pydoc.plaintext)
    assert "class LossHead" in text and "sftmix_loss(" in text and "PACKAGE CONTENTS" in text
    assert "stats: 'bool' = False" in pydoc.render_doc(LossHead.forward, renderer=pydoc.plaintext)


def test_a_call_is_still_torchs_own() -> None:
    """The forms for type checkers exist for them alone: hooks and compiled calls go through nn.Module's."""
    assert "__call__" not in vars(LossHead) and not typing.TYPE_CHECKING
