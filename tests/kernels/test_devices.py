"""What the doctor says of torch, triton and the device: old, missing, broken, hidden, or without kernels for it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sftmix_kernels import Finding
from sftmix_kernels.doctor import devices
from tests.test_install import PYPROJECT, table_of

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


# ---- versions ----


def test_least_versions_are_pyprojects() -> None:
    needed = {requirement.name: str(requirement.specifier) for requirement in table_of("dependencies")}
    assert {name: f">={devices.LEAST[name]}" for name in ("torch", "triton")} == needed
    assert PYPROJECT["project"]["requires-python"] == f">={devices.LEAST['Python']}"


@pytest.mark.parametrize(
    "version, least, good",
    [
        ("2.11", "2.11", True), ("2.11.0+cu130", "2.11", True), ("2.13.0a0+git12", "2.11", True),
        ("2.9.1", "2.11", False), ("3.10", "3.6", True), ("2.10.99", "2.11", False), ("dev", "1.0", False),
    ],
)  # fmt: skip
def test_versions_are_compared_by_number(version: str, least: str, good: bool) -> None:
    assert Finding.of_version("x", version, least).level == ("well" if good else "wrong")


def test_an_old_torch_is_wrong(monkeypatch: pytest.MonkeyPatch, says: Any) -> None:
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu121")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    code, text = says(devices.version_findings(CPU))
    assert code == 1
    assert (
        'torch 2.5.1+cu121, a CPU build is too old (supported: >= 2.11) -> pip install --upgrade "torch>=2.11"'
        in text
    )


def test_triton_is_needed_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch, says: Any) -> None:
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    assert says([devices.triton(CPU)]) == (
        0,
        "triton not installed; nothing on a CPU needs it Nothing is wrong.",
    )
    code, text = says([devices.triton(GPU)])
    assert code == 1 and 'slower chunked implementation -> pip install --upgrade "triton>=3.6"' in text


def test_a_triton_that_cannot_be_imported_is_wrong_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, says: Any
) -> None:
    import sftmix_kernels

    monkeypatch.setitem(sys.modules, "sftmix_kernels.fused", None)
    monkeypatch.delattr(sftmix_kernels, "fused", raising=False)
    code, text = says([devices.triton(GPU)])
    assert code == 1 and "triton installed, but its import fails: ModuleNotFoundError" in text
    assert "pip show torch" in text


def test_triton_under_the_name_of_torchs_rocm_build_is_found(
    monkeypatch: pytest.MonkeyPatch, says: Any
) -> None:
    monkeypatch.setattr(devices, "installed", {"pytorch-triton-rocm": "3.6.0"}.get)
    assert says([devices.triton(CPU)])[1].startswith("triton 3.6.0 (supported")


# ---- device ----


def test_a_gpu_is_told_with_what_it_can_do(h100: None, says: Any) -> None:
    code, text = says(devices.device_findings(devices.current_device()))
    assert code == 0
    assert "device NVIDIA H100, sm_90, 132 processors, 79.0 of 80.0 GiB free" in text
    assert "bfloat16 in hardware: compute capability 9.0" in text


@pytest.mark.parametrize(
    "error, advice",
    [
        ("CUDA error: no kernel image is available for execution on the device",
         "built for sm_75 sm_80: install one built for sm_90"),
        ("CUDA error: all CUDA-capable devices are busy or unavailable", "whether another process holds the GPU"),
    ],
)  # fmt: skip
def test_a_gpu_on_which_no_product_runs_is_wrong(
    h100: None, monkeypatch: pytest.MonkeyPatch, says: Any, error: str, advice: str
) -> None:
    """torch.cuda.is_available() is True for a GPU that this torch has no kernels for."""

    def fail(*args: object, **options: object) -> float:
        raise RuntimeError(error + "\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(devices, "time_product", fail)
    code, text = says(devices.device_findings(GPU))
    assert code == 1 and error in text and advice in text and "DSA" not in text


def no_gpu(monkeypatch: pytest.MonkeyPatch, *, built: bool, sign: str, reason: str = "") -> None:
    def init() -> None:
        raise RuntimeError(reason)

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(devices, "has_driver", lambda: sign == "driver")
    monkeypatch.setattr(devices, "has_card", lambda: sign != "")
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 11040)."
NO_DRIVER = "Found no NVIDIA driver on your system."


@pytest.mark.parametrize(
    "built, sign, reason, code, part",
    [
        (False, "", "", 0, ""),
        (False, "driver", "", 1, "this torch is a CPU build -> install torch's CUDA (or ROCm) build"),
        (False, "card", "", 0, "~ GPU this machine has one, but this torch is a CPU build"),
        (True, "driver", NO_DRIVER, 1, f"sees none: RuntimeError: {NO_DRIVER} -> install the driver"),
        (True, "card", NO_DRIVER, 1, f"sees none: RuntimeError: {NO_DRIVER} -> install the driver"),
        (True, "", OLD_DRIVER, 1, f"{OLD_DRIVER} -> install the driver this torch needs, or a torch for the driver"),
        (True, "", NO_DRIVER, 0, "if not, all runs on the CPU, and a CPU build is smaller"),
    ],
)  # fmt: skip
def test_a_gpu_that_torch_does_not_use_is_told_with_torchs_reason(
    monkeypatch: pytest.MonkeyPatch, says: Any, built: bool, sign: str, reason: str, code: int, part: str
) -> None:
    no_gpu(monkeypatch, built=built, sign=sign, reason=reason)
    found, text = says(devices.device_findings(CPU))
    assert found == code and part in text
    assert ("GPU" in text) == bool(part)


def test_a_gpu_that_the_user_hides_is_no_fault(monkeypatch: pytest.MonkeyPatch, says: Any) -> None:
    no_gpu(monkeypatch, built=True, sign="driver", reason="No CUDA GPUs are available")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    code, text = says(devices.device_findings(CPU))
    assert code == 0 and "GPU hidden by CUDA_VISIBLE_DEVICES=-1" in text


def test_an_nvidia_card_is_seen_on_the_bus(tmp_path: Path) -> None:
    def plug(slot: str, vendor: str, kind: str) -> None:
        folder = tmp_path / "sys/bus/pci/devices" / slot
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(vendor + "\n")
        (folder / "class").write_text(kind + "\n")

    plug("0", "0x10de", "0x040300")  # the card's sound
    plug("1", "0x8086", "0x030000")
    assert not devices.has_card(tmp_path)
    plug("2", "0x10de", "0x030200")
    assert devices.has_card(tmp_path)


def test_16_bit_products_not_in_hardware_are_said_and_no_fault(
    monkeypatch: pytest.MonkeyPatch, says: Any
) -> None:
    from sftmix_kernels import ProductSupport

    monkeypatch.setattr(devices, "product_support", lambda *args: ProductSupport(False, "asked"))
    monkeypatch.setattr(devices, "unused_gpu", lambda: None)
    code, text = says(devices.device_findings(CPU))
    assert code == 0 and "~ products bfloat16 not in hardware, float32 is faster: asked" in text
