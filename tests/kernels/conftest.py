"""Uninitialised buffers are full of NaN, so that an unwritten element shows; and what the doctor's tests share."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch._subclasses import fake_tensor

from sftmix_kernels import Finding
from sftmix_kernels.doctor import devices
from sftmix_kernels.doctor.findings import show


@pytest.fixture(autouse=True)
def poisoned_buffers() -> Iterator[None]:
    """In deterministic mode torch fills what ``torch.empty`` returns with NaN (integers: their maximum)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Callable[[Iterable[Finding]], tuple[int, str]]:
    """Exit code and printed text, in one line, of some findings."""

    def verdict(findings: Iterable[Finding]) -> tuple[int, str]:
        code = show("title", findings)
        return code, " ".join(capsys.readouterr().out.split())

    return verdict


Properties = namedtuple("Properties", "name major minor multi_processor_count gcnArchName total_memory")


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch as it is on a machine with one GPU, as far as it is asked."""
    properties = Properties("NVIDIA H100", 9, 0, 132, "", 80 * 10**9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (79 * 2**30, 80 * 2**30))
    monkeypatch.setattr(devices, "time_product", lambda *args, **options: 1.0)
    # A CUDA build of torch would start the GPU for a fake tensor.
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None, raising=False)
