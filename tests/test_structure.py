"""The shape of the code: who imports whom, and how long files and functions are."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("sftmix_kernels", "sftmix", "bench")
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
# A module of the kernels may import those of a lower rank only.
KERNEL_RANKS = {
    "checks": 0, "reference": 0, "hardware": 0, "shareable": 0, "call": 1, "lora_head": 1, "terms": 2,
    "vocab_parallel": 3, "chunked": 3, "fused": 4, "choice": 5, "operators": 5, "autocast": 6, "arguments": 6,
    "exchange": 6, "footprint": 6, "functional": 7, "head": 8, "around_head": 9, "doctor": 9, "": 10,
    "__main__": 11,
}  # fmt: skip
KERNEL_FOLDERS = {"chunked", "fused", "vocab_parallel", "doctor"}
LEAVES = {
    "sftmix.evaluation.plots", "sftmix.run.report", "sftmix.integrations",
    *(name for name in SOURCES if name.startswith("sftmix.report")),
}  # fmt: skip
LEAF_USERS = {
    "sftmix.transformers.callback", "sftmix.cli", "sftmix.run.stages", "sftmix.run.texts", "sftmix.run.closing",
    "sftmix.demo.job", *LEAVES
}  # fmt: skip
# A room of the recipe, or a file beside the rooms, may import those of a lower rank only. The layout of a run folder is
# below the rooms that read one.
RECIPE_RANKS = {
    "": 0, "files": 0, "rank": 0, "hardware": 0, "knobs": 0, "progress": 1, "sections": 1, "config": 2, "process": 2,
    "recipes": 2, "knobs_page": 3, "data": 3, "model": 3, "scores": 4, "doctor": 4, "terminal": 4, "training": 5,
    "evaluation": 6, "run.folder": 2, "report": 7, "run": 8, "transformers": 8, "planning": 9, "curation": 9, "demo": 9,
    "trl": 9, "axolotl": 9, "cli": 10, "examples": 10, "__main__": 11,
}  # fmt: skip


RECIPE_BENCHES = {"data", "load", "loop", "loop_ways", "loop_profile", "suspects"}


def walk_at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING`, which only a type checker imports."""
    todo = [tree]
    while todo:
        node = todo.pop()
        yield node
        only_types = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        todo += node.orelse if only_types and isinstance(node, ast.If) else ast.iter_child_nodes(node)


def imports(path: Path, module: str) -> Iterator[str]:
    """Absolute names of all that ``path`` imports when it runs, in functions too; `from x import y` gives x.y."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in walk_at_run_time(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def modules_imported(module: str) -> set[str]:
    """Modules of this project that ``module`` imports: the longest prefix of each name that is a file of it."""
    found = set()
    for name in imports(SOURCES[module], module):
        while name and name not in SOURCES:
            name = name.rpartition(".")[0]
        if name:
            found.add(name)
    return found - {module}


def tops(module: str) -> set[str]:
    return {name.split(".")[0] for name in imports(SOURCES[module], module)}


def of(package: str) -> list[str]:
    return [name for name in SOURCES if name.split(".")[0] == package]


def test_imports_are_read_rightly(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    text = "import a.b\nfrom . import c\nfrom .d import e\ndef f():\n    from ..g import h\n"
    path.write_text(text + "if TYPE_CHECKING:\n    import i\nelse:\n    import j\n")
    assert set(imports(path, "p.q.m")) == {"a.b", "p.q.c", "p.q.d.e", "p.g.h", "j"}


@pytest.mark.parametrize("module", of("sftmix_kernels"))
def test_kernels_import_torch_and_only_fused_imports_triton(module: str) -> None:
    stdlib_and_own = {name for name in tops(module) if name in _STDLIB or name == "sftmix_kernels"}
    allowed = {"torch", "triton"} if ".fused" in module else {"torch"}
    assert tops(module) - stdlib_and_own <= allowed


@pytest.mark.parametrize("module", of("sftmix_kernels"))
def test_kernels_are_layered(module: str) -> None:
    def layer(name: str) -> str:
        return name.removeprefix("sftmix_kernels").removeprefix(".").split(".")[0]

    for other in modules_imported(module):
        if layer(other) == layer(module) in KERNEL_FOLDERS:
            continue
        assert KERNEL_RANKS[layer(other)] < KERNEL_RANKS[layer(module)], f"{module} imports {other}"


def test_nothing_imports_bench_or_tests() -> None:
    for module in [*of("sftmix"), *of("sftmix_kernels")]:
        assert not tops(module) & {"bench", "tests"}, module
    for module in of("bench"):  # the loss is measured by itself; these measure the recipe around it
        recipe = module.removeprefix("bench.") in RECIPE_BENCHES
        assert not tops(module) & ({"tests"} if recipe else {"sftmix", "tests"}), module


def test_recipe_uses_public_names_of_the_kernels() -> None:
    import sftmix_kernels

    public = {f"sftmix_kernels.{name}" for name in [*sftmix_kernels.__all__, "__version__"]}
    for module in of("sftmix"):
        names = {name for name in imports(SOURCES[module], module) if name.startswith("sftmix_kernels")}
        assert names <= public, module


def test_only_the_command_line_and_its_stages_import_leaves() -> None:
    for module in of("sftmix"):
        if module not in LEAF_USERS:
            assert not modules_imported(module) & LEAVES, module


@pytest.mark.parametrize("module", of("sftmix"))
def test_rooms_of_the_recipe_are_layered(module: str) -> None:
    def room(name: str) -> str:
        inside = name.removeprefix("sftmix").removeprefix(".")
        return inside if inside in RECIPE_RANKS else inside.split(".")[0]

    for other in modules_imported(module):
        if other.split(".")[0] == "sftmix" and room(other) != room(module):
            assert RECIPE_RANKS[room(other)] < RECIPE_RANKS[room(module)], f"{module} imports {other}"


def test_there_are_no_import_cycles() -> None:
    graph = {module: modules_imported(module) for module in SOURCES}
    graph["sftmix_kernels.fused"] = (
        set()
    )  # the package gathers its modules' names, which import it by being in it
    graph = {module: others - {module.rpartition(".")[0]} for module, others in graph.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, naming the modules
    assert set(order) == set(SOURCES)


def test_model_comes_before_trainer_before_command_line() -> None:
    """DESIGN's direction in the recipe, including what is reached through other modules."""

    def reaches(module: str) -> set[str]:
        seen: set[str] = set()
        todo = [module]
        while todo:
            for other in modules_imported(todo.pop()) - seen:
                seen.add(other)
                todo.append(other)
        return seen

    assert "sftmix_kernels" in reaches("sftmix.model.causal_lm")
    assert "sftmix.model.causal_lm" in reaches("sftmix.training.trainer")
    assert "sftmix.training.trainer" in reaches("sftmix.cli")
    assert not reaches("sftmix.model.causal_lm") & {
        "sftmix.training.trainer",
        "sftmix.run.stages",
        "sftmix.cli",
    }
    assert not reaches("sftmix.training.trainer") & {"sftmix.run.stages", "sftmix.cli"}


@pytest.mark.parametrize("module", list(SOURCES))
def test_files_and_functions_stay_small(module: str) -> None:
    """A file under about 300 lines, a function under about 60; 400 and 100 where Triton kernels live."""
    file_limit, function_limit = (420, 105) if ".fused" in module else (320, 70)
    text = SOURCES[module].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= file_limit
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            # Arguments and docstring document, they are not length.
            first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]
            length = (node.end_lineno or 0) - first.lineno + 1
            assert length <= function_limit, f"{node.name} has {length} lines"


@pytest.mark.parametrize("module", list(SOURCES))
def test_modules_say_what_they_are_and_leave_nothing_behind(module: str) -> None:
    text = SOURCES[module].read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "no module docstring"
    assert not re.search(r"\b(TODO|FIXME|XXX)\b(?!.*#\d)", text), "a TODO needs the number of an issue"


_STDLIB = frozenset(__import__("sys").stdlib_module_names)


@pytest.mark.slow
def test_tests_have_the_same_names_in_every_process() -> None:
    """Workers collect for themselves: a name that holds a clock's time or a set's order stops them all."""
    found = []
    for seed in ("1", "2"):  # seconds apart, with strings hashed differently
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", "tests"]
        run = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stdout[-2000:]
        found.append([line for line in run.stdout.splitlines() if "::" in line])
    assert len(found[0]) > 1000
    assert found[0] == found[1]
