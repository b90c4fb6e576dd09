"""What installing gives: a light loss, typed packages, one version, pins that agree with the requirements."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def pins_of(path: Path) -> list[Requirement]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


CONSTRAINTS = pins_of(ROOT / "constraints.txt")
OLDEST = pins_of(ROOT / "tests" / "oldest.txt")
# What the loss may not need: triton, and every package of the recipe.
BLOCKED = (
    "triton transformers datasets accelerate peft pyarrow matplotlib rich typer yaml safetensors gguf trl "
    "pandas pytest hypothesis"
).split()
BLOCKER = f"""
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {BLOCKED!r} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


def run_blocked(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BLOCKER + code], cwd=ROOT, capture_output=True, text=True)


def table_of(name: str) -> list[Requirement]:
    """The requirements of one extra, or of the project itself for "dependencies"."""
    project = PYPROJECT["project"]
    return [Requirement(text) for text in {**project["optional-dependencies"], **project}[name]]


def test_kernels_import_and_work_without_triton_and_the_recipe() -> None:
    done = run_blocked("""
import torch
from sftmix_kernels import LossHead, sftmix_loss, token_stats
hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
target, lam = torch.randint(9, (6,)), torch.rand(3)
sftmix_loss(hidden, weight, target, lam).loss.backward()
assert weight.grad.abs().sum() > 0
try:
    sftmix_loss(hidden, weight, target, lam, impl="fused")
except ValueError as problem:
    assert "triton" in str(problem), problem
else:
    raise AssertionError("fused without triton")
""")
    assert done.returncode == 0, done.stderr


def test_the_block_is_a_block() -> None:
    """The import hook of the test above does keep packages out."""
    done = run_blocked("import triton")
    assert "No module named 'triton'" in done.stderr


def test_importing_the_kernels_loads_nothing_of_the_recipe() -> None:
    code = "import sys, sftmix_kernels; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "sftmix_kernels" in loaded
    assert not loaded & {
        "sftmix",
        "transformers",
        "datasets",
        "peft",
        "pyarrow",
        "matplotlib",
        "typer",
        "bench",
    }


def test_both_packages_are_typed_and_packaged() -> None:
    for package in ("sftmix_kernels", "sftmix"):
        assert (ROOT / package / "py.typed").is_file()
        patterns = PYPROJECT["tool"]["setuptools"]["package-data"][package]
        packed = {file for pattern in patterns for file in (ROOT / package).glob(pattern)}
        data = {
            file
            for file in (ROOT / package).rglob("*")
            if file.is_file() and file.suffix not in {".py", ".pyc", ".md"}
        }
        assert packed == data


def test_one_version() -> None:
    import sftmix
    import sftmix_kernels

    version = PYPROJECT["project"]["version"]
    assert sftmix_kernels.__version__ == version
    assert sftmix.__version__ == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_base_requirements_are_torch_and_triton() -> None:
    base = {requirement.name: requirement for requirement in table_of("dependencies")}
    assert set(base) == {"torch", "triton"}
    assert base["triton"].marker is not None
    assert not base["triton"].marker.evaluate({"platform_system": "Windows"})


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_pins_meet_the_requirements_on_each_python(python: str) -> None:
    """One pin a package, inside the range that pyproject.toml asks for, for everything make installs."""
    environment = {"python_version": python, "python_full_version": f"{python}.9", "platform_system": "Linux"}
    pins: dict[str, str] = {}
    for pin in CONSTRAINTS:
        if pin.marker is None or pin.marker.evaluate(environment):
            name = pin.name.lower().replace("_", "-")
            assert name not in pins, f"{name} is pinned twice on Python {python}"
            (specifier,) = pin.specifier
            assert specifier.operator == "=="
            pins[name] = specifier.version
    assert pins["torch"] == "2.13.0"
    assert pins["triton"].startswith("3.7.")
    for extra in ("dependencies", "recipe", "demo", "bench", "dev"):
        for needed in table_of(extra):
            if needed.name != "sftmix" and (needed.marker is None or needed.marker.evaluate(environment)):
                assert needed.specifier.contains(pins[needed.name.lower().replace("_", "-")]), needed


def test_the_oldest_environment_has_the_lower_bounds() -> None:
    """Of torch, triton and transformers exactly the oldest that pyproject.toml allows; the others inside its ranges."""
    needed = {item.name: item.specifier for extra in ("dependencies", "recipe") for item in table_of(extra)}
    pins = {pin.name: next(iter(pin.specifier)).version for pin in OLDEST}
    for name in ("torch", "triton", "transformers"):
        (floor,) = needed[name]
        assert floor.operator == ">=" and pins[name] == f"{floor.version}.0"
    assert all(needed[name].contains(version) for name, version in pins.items())


def test_pythons_named_are_those_that_are_pinned() -> None:
    named = {
        text.rpartition(" ")[2] for text in PYPROJECT["project"]["classifiers"] if ":: Python :: 3." in text
    }
    assert named == {"3.10", "3.11", "3.12", "3.13"}


def test_licence_is_apache_and_whole() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert [number for number in range(1, 10) if f"\n   {number}. " not in text] == []
    assert PYPROJECT["project"]["license"] == "Apache-2.0"


def test_an_old_python_is_refused_with_a_clear_message(tmp_path: Path) -> None:
    """`make test` with a Python below 3.10 says so before it makes anything."""
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\ncase "$*" in *version_info*) exit 1;; *-V*) echo "Python 3.8.18";; esac\n')
    old.chmod(0o755)
    command = ["make", "test", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode != 0
    assert "needs Python >= 3.10" in done.stderr
    assert "3.8.18" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_a_second_make_reuses_the_environment(tmp_path: Path) -> None:
    """A stamp newer than the pins: make goes straight to the tests; an older one: it installs again."""
    stamp = tmp_path / "venv" / ".sftmix-installed"
    stamp.parent.mkdir()
    stamp.touch()
    command = ["make", "--dry-run", "test", f"VENV={stamp.parent}"]

    def plan() -> str:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert "pip install" not in plan()
    assert "-m pytest" in plan()
    assert "-m 'not slow'" in plan()
    os.utime(stamp, (0, 0))
    assert "pip install" in plan()


def test_every_test_is_in_make_test_or_in_make_slow_and_ci_runs_both(tmp_path: Path) -> None:
    def recipe(target: str) -> str:
        (tmp_path / ".sftmix-installed").touch()
        command = ["make", "--dry-run", target, f"VENV={tmp_path}"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert recipe("test").replace("-m 'not slow'", "-m slow") == recipe("slow")
    assert all("--progress 10" in recipe(target) for target in ("test", "slow"))
    assert "for target in test slow lint" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_other_environments_are_built_beside_the_usual_one() -> None:
    def plan(target: str, *options: str) -> str:
        command = ["make", "--dry-run", target, *options]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    this = "{}.{}".format(*sys.version_info)
    assert f".venv-{this}/bin/python -m pytest" in plan("test-python", f"PYTHON={sys.executable}")
    oldest = plan("test-oldest", f"PYTHON={sys.executable}")
    assert ".venv-oldest/bin/python -m pytest" in oldest
    assert "-c tests/oldest.txt" in oldest or ".sftmix-installed" not in oldest


def test_a_worker_of_pytest_xdist_takes_one_core() -> None:
    """Also when pytest is called by hand: two workers of two threads each are slower than one process."""
    code = "import tests.conftest, torch; print(torch.get_num_threads())"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment["PYTEST_XDIST_WORKER"] = "gw0"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "1", done.stderr
