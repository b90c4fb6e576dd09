"""Compile every kernel ahead of time, as the launcher would, on a machine without a GPU; print what came out.

    python -m tests.kernels.aot [--quick] [--part I/N]      a JSON line per kernel; must run without TRITON_INTERPRET
    python -m tests.kernels.aot --full              for every chip, into bench/results/compile_matrix.json: minutes
    python -m tests.kernels.aot --candidates        bench.tune's tiles on sm_90, into bench/results/tile_candidates.json
    python -m tests.kernels.aot --sass              tiles on NVIDIA's chips by instruction, into bench/results/sass.json

The public functions are called on meta tensors with the launch replaced by a recorder, so that the kernels see the
very arguments of a real launch: constants, divisibility, descriptors. Then Triton compiles for a target, and the
tools inside its wheel read the result: cuobjdump the registers and the stack, ptxas its notes on serialised wgmma.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from bench import sass, tune
from sftmix_kernels.call import Coefficients, Kept, Upstream
from sftmix_kernels.fused import (
    Tile,
    forward,
    fused_backward,
    fused_forward,
    statistics_with_gradients,
    stats,
    tiles,
)
from tests.kernels.fused_calls import plain_call

# One chip of each entry of configs.py's table, then those that take another's entry.
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
QUICK_ARCHS = ("sm_90", "gfx942")
OTHER_ARCHS = ("sm_86", "sm_89", "sm_120", "gfx90a", "gfx950")
# What one program may have, in bytes: CUDA's programming guide, table of compute capabilities; AMD's LDS.
SHARED_LIMIT = {
    "sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024,
    "sm_120": 99 * 1024, "gfx90a": 64 * 1024, "gfx942": 64 * 1024, "gfx950": 160 * 1024,
}  # fmt: skip
OPERATIONS = ("forward", "recompute", "stored")
TABLE = Path(__file__).resolve().parents[2] / "bench" / "results" / "compile_matrix.json"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.bool: "i1",
    torch.int32: "i32",
    torch.int64: "i64",
}
COUNTED = {
    "wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma", "mma.sync": r"mma\.sync", "mfma": "v_mfma",
    "bulk loads": r"cp\.async\.bulk\.tensor\.2d\.shared", "tf32": "tf32", "xf32": "xf32",
    "float32 sums": r"(?:add|sub|fma)(?:\.rn)?\.f32|v_(?:add|sub|fma\w*)_f32",
    "16-byte loads": r"ld\.global[\w.]*\.v4\.b32|global_load_dwordx4|buffer_load_dwordx4",
    "16-byte stores": r"st\.global[\w.]*\.v4\.b32|global_store_dwordx4|buffer_store_dwordx4",
    "2-byte stores": r"st\.global[\w.]*\.b16|global_store_short|buffer_store_short",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One call of the public functions: Llama-3's head by default."""

    operation: str
    arch: str
    dtype: str
    paired: bool
    variant: str = "plain"
    options: dict[str, Any] = field(default_factory=dict)
    num_rows: int = 8192
    vocab_size: int = 128256
    hidden_size: int = 4096
    aligned: bool = True
    tf32: bool = False
    tile: Tile | None = None

    @property
    def name(self) -> str:
        return "-".join(
            (self.operation, "pairs" if self.paired else "rows", self.arch, self.dtype, self.variant)
        )


def full_cases() -> Iterator[Case]:
    """Default tiles for every chip, dtype and operation, and with a softcap; the variants of sm_90."""
    for arch in (*ARCHS, *OTHER_ARCHS):
        for operation in OPERATIONS:
            for paired in (True, False):
                for dtype in ("bfloat16", "float16", "float32"):
                    yield Case(operation, arch, dtype, paired)
                yield Case(
                    operation, arch, "bfloat16", paired, "softcap", {"softcap": 30.0, "logit_scale": 0.5}
                )
    yield from variant_cases()


def cases() -> Iterator[Case]:
    """What `make slow` compiles: sm_90 whole, of other tile tables the pairs in bfloat16."""
    for case in full_cases():
        if case.arch == "sm_90" or (case.arch in ARCHS and case.paired and case.dtype == "bfloat16"):
            yield case


def quick_cases() -> Iterator[Case]:
    """What `make test` compiles: one chip of each maker, pairs alone; float32, a ragged buffer and the controls."""
    for case in cases():
        plain = case.paired and case.variant == "plain" and case.arch in QUICK_ARCHS
        if plain and case.dtype in ("bfloat16", "float32"):
            yield case
        elif case.variant.startswith("control") or case.name == "stored-pairs-sm_90-bfloat16-ragged":
            yield case


def variant_cases() -> Iterator[Case]:
    """On sm_90 every compile-time variant; a control for each check."""
    smoothed = {"label_smoothing": 0.1, "z_loss": 1e-4}
    for operation in OPERATIONS:
        for paired in (True, False):
            base = (operation, "sm_90", "bfloat16", paired)
            yield Case(*base, "bias", {"bias": True})
            if operation != "stored":  # whose low-rank product is the library's
                yield Case(*base, "lora", {"rank": 16})
                yield Case(*base, "lora-ragged", {"rank": 20, "bias": True}, vocab_size=50257)
            yield Case(*base, "ragged", vocab_size=50257, hidden_size=2056)
            yield Case(*base, "misaligned", aligned=False)
            # Triton turns an integer 1 into a constant, which must not break what expects a variable.
            yield Case(*base, "ones", num_rows=1 + paired, vocab_size=1, hidden_size=1, aligned=False)
            for name, extra in (
                ("smoothed", {}),
                ("smoothed-softcap", {"softcap": 30.0, "logit_scale": 0.5}),
            ):
                yield Case(*base, name, {**smoothed, **extra})
    for arch in ARCHS:
        yield from option_cases(arch)
    small = Tile(64, 128, 64, num_warps=4, num_stages=3, use_descriptors=True)
    for operation in ("forward", "recompute"):
        yield Case(operation, "sm_90", "bfloat16", True, "64x128", tile=small)
    # Controls: a tile known to spill and serialise, one known to lose wgmma, and float32 with TF32 allowed.
    yield Case(
        "forward", "sm_90", "bfloat16", True, "control-128x128-w4", tile=Tile(128, 128, 64, num_warps=4)
    )
    yield Case("forward", "sm_90", "bfloat16", True, "control-32x256", tile=Tile(32, 256, 64, num_warps=8))
    yield Case("forward", "sm_90", "float32", True, "control-tf32", tf32=True)


def option_cases(arch: str) -> Iterator[Case]:
    """What a call may ask beside the plain loss: class weights, predicted columns, statistics and their gradients."""
    weighed = {"class_weight": True, "label_smoothing": 0.1}
    for paired in (True, False):
        for operation in OPERATIONS:
            yield Case(operation, arch, "bfloat16", paired, "class-weight", weighed)
        for operation in ("forward", "stored"):
            yield Case(operation, arch, "bfloat16", paired, "predicted", {"predicted": True})
        yield Case("forward", arch, "bfloat16", paired, "entropy", {"entropy": True})
        scaled = {"class_weight": True, "token_scaling": True}
        yield Case("stored", arch, "bfloat16", paired, "class-weight-scaled", scaled)
    # Of rows alone: pairs have no upstream of their own.
    asked = {"entropy": True, "num_tokens": 4}
    yield Case("recompute", arch, "bfloat16", False, "statistics", asked)
    yield Case("recompute", arch, "bfloat16", False, "statistics-softcap", {**asked, "softcap": 30.0})
    yield Case("recompute", arch, "bfloat16", False, "statistics-bias", {**asked, "bias": True})
    yield Case(
        "forward", arch, "bfloat16", False, "statistics", {"entropy": True, "predicted": True, "bias": True}
    )


def candidate_cases() -> Iterator[Case]:
    """Every tile that bench.tune would time on sm_90, as it would be launched there."""
    for operation in ("forward", "recompute"):
        for paired in (True, False):
            for tile in tune.sizes_of(paired, bulk=True):
                yield Case(operation, "sm_90", "bfloat16", paired, tune.source(tile), tile=tile)


def sass_cases() -> Iterator[Case]:
    """The tables' 16-bit tiles on NVIDIA's chips, and what else changes their rest; then the tuner's, of pairs."""
    for arch in sass.TENSOR_RATE:
        for operation in OPERATIONS:
            for paired in (True, False):
                base = (operation, arch, "bfloat16", paired)
                yield Case(*base)
                if operation == "stored":
                    continue
                yield Case(*base, "bias", {"bias": True})
                yield Case(*base, "softcap", {"softcap": 30.0, "logit_scale": 0.5})
                if operation == "forward":
                    yield Case(*base, "entropy", {"entropy": True})
    for operation in ("forward", "recompute"):
        for tile in tune.sizes_of(True, bulk=True):
            if tile.use_descriptors:
                yield Case(operation, "sm_90", "bfloat16", True, sass.CANDIDATES, tile=tile)


def launches(case: Case) -> list[tuple[JITFunction, dict[str, Any]]]:
    """The kernels that ``case`` launches, with their arguments."""
    recorded: list[tuple[JITFunction, dict[str, Any]]] = []

    def record(kernel: JITFunction, *, grid: Any, warmup: bool, **arguments: Any) -> None:
        recorded.append((kernel, arguments))

    with (
        patch.object(JITFunction, "run", record),
        patch.object(tiles, "current_arch", lambda _: case.arch),
        patch.object(tiles, "can_describe", lambda _: case.aligned),
        patch.object(tiles, "dot_precision", lambda _: "tf32" if case.tf32 else "ieee"),
        patch.object(forward, "choose_num_splits", lambda *_: 16),
    ):
        call(case)
    kernels = {kernel.__name__: (kernel, arguments) for kernel, arguments in reversed(recorded)}
    return list(kernels.values())


def call(case: Case) -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    num_rows, num_pairs = case.num_rows, case.num_rows // 2 if case.paired else 0
    dtype = getattr(torch, case.dtype)
    hidden, weight = (
        meta(num_rows, case.hidden_size, dtype=dtype),
        meta(case.vocab_size, case.hidden_size, dtype=dtype),
    )
    target, lam = meta(num_rows, dtype=torch.int64), meta(num_pairs)
    options: dict[str, Any] = {**case.options, "target": target}
    if options.get("bias"):
        options["bias"] = meta(case.vocab_size, dtype=dtype)
    if options.get("class_weight"):
        options["class_weight"] = meta(case.vocab_size)
    if count := options.pop("num_tokens", 0):
        options["tokens"] = meta(num_rows, count, dtype=torch.int64)
    if rank := options.pop("rank", 0):
        options |= {"low": meta(num_rows, rank, dtype=dtype), "up": meta(case.vocab_size, rank, dtype=dtype)}
    rows, pairs = (meta(n, dtype=torch.float64) for n in (num_rows, num_pairs))
    checked = plain_call(hidden, weight, lam, **options)
    if case.operation == "forward":
        fused_forward(checked, target, tile=case.tile)
    elif case.operation == "stored":
        statistics_with_gradients(checked, Coefficients(target, rows, pairs))
    else:
        upstream = Upstream(rows, pairs)
        if checked.tokens is not None:
            upstream = Upstream(rows, pairs, meta(num_rows), meta(num_rows), meta(*checked.tokens.shape))
        kept = Kept(meta(3, num_rows), meta(4, num_pairs), meta(num_rows))
        fused_backward(checked, target, kept, upstream, tile=case.tile)


def source(kernel: JITFunction, arguments: dict[str, Any]) -> ASTSource:
    """What Triton's launcher would compile for ``arguments``: types, constants and divisibility by 16."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        plain = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not plain):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            if not plain and not parameter.do_not_specialize_on_alignment:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = parameter.annotation_type or "fp32"
        else:
            signature[name] = "i32"
            assert isinstance(value, int) and value < 2**31, f"{name}: expected an int32, got {value!r}"
            if value % 16 == 0 and not plain:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def compile_launch(
    kernel: JITFunction, arguments: dict[str, Any], arch: str, *, instructions: bool = False
) -> dict[str, Any]:
    """Compile one launch for ``arch`` and read its resources; with ``instructions`` what bench.sass counts, too."""
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    options = {k: arguments[k] for k in ("num_warps", "num_stages", "maxnreg") if k in arguments}
    compiled = triton.compile(source(kernel, arguments), target=target, options=options)
    assembly = compiled.asm["amdgcn" if amd else "ptx"]
    counts = {name: len(re.findall(pattern, assembly)) for name, pattern in COUNTED.items()}
    resources = amd_resources(assembly) if amd else nvidia_resources(compiled.asm["cubin"], assembly, arch)
    counted = {} if amd or not instructions else sass.count(disassembled(compiled.asm["cubin"]))
    return {
        **resources,
        **counted,
        "shared": compiled.metadata.shared,
        "warps": arguments.get("num_warps"),
        "counts": counts,
    }


def amd_resources(assembly: str) -> dict[str, Any]:
    def read(name: str) -> int:
        found = re.search(rf"\.{name}:?\s+(\d+)", assembly)
        assert found, f"no {name} in the assembly"
        return int(found[1])

    return {"registers": read("vgpr_count"), "stack": read("private_segment_fixed_size"), "notes": []}


def nvidia_resources(cubin: bytes, ptx: str, arch: str) -> dict[str, Any]:
    target = re.search(r"\.target (\w+)", ptx)
    assert target
    ptxas = TOOLS / ("ptxas-blackwell" if int(arch.removeprefix("sm_")) >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "k.cubin").write_bytes(cubin)
        (path / "k.ptx").write_text(ptx)
        dump = [TOOLS / "cuobjdump", "--dump-resource-usage", path / "k.cubin"]
        usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
        notes = ""
        if "wgmma" in ptx:  # the notes are about wgmma alone, and a second ptxas costs as much as the first
            assemble = [ptxas, "-v", f"--gpu-name={target[1]}", path / "k.ptx", "-o", path / "o"]
            notes = subprocess.run(assemble, capture_output=True, text=True, check=True).stderr
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    serialised = sorted(set(re.findall(r"C75\d\d", notes)))
    return {"registers": int(found[1]), "stack": int(found[2]), "notes": serialised}


def disassembled(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "k.cubin"
        path.write_bytes(cubin)
        command = [TOOLS / "nvdisasm", "-hex", "-c", path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def has_columns(arguments: dict[str, Any]) -> bool:
    """Whether a kernel works on columns of logits; the others are of numbers of rows."""
    return "BLOCK_V" in arguments


def sass_line(case: Case) -> dict[str, Any]:
    """One line of bench.sass's counts: the kernel of ``case`` that has the tile, or the rows."""
    kernel, arguments = next(found for found in launches(case) if has_columns(found[1]))
    counted = compile_launch(kernel, arguments, case.arch, instructions=True)
    del counted["counts"]
    sizes = [arguments[k] for k in ("BLOCK_N", "BLOCK_V", "BLOCK_D") if k in arguments]
    where = {
        "case": case.name,
        "operation": case.operation,
        "arch": case.arch,
        "paired": case.paired,
        "variant": case.variant,
    }
    columns = {"columns": sizes[0]} if len(sizes) == 1 else {}
    tile = "x".join(map(str, sizes))
    return {**where, "tile": tile, "stages": arguments.get("num_stages"), **columns, **counted}


def write_sass(path: Path) -> None:
    text = ",\n".join(json.dumps(sass_line(case)) for case in sass_cases())
    path.write_text(f'{{"triton": "{triton.__version__}", "kernels": [\n{text}\n]}}\n', "utf-8")


def lines(selected: list[Case], *, instructions: bool = False) -> Iterator[dict[str, Any]]:
    """One dictionary per compiled kernel; with ``instructions`` what bench.sass counts in those of its chips."""
    for case in selected:
        for kernel, arguments in launches(case):
            # It has no tile, and of the options only the moment is its own.
            if kernel is stats._sftmix_fwd_combine_kernel and case.variant not in (
                "plain", "entropy", "smoothed", "ones", "predicted",
            ):  # fmt: skip
                continue
            shape = "x".join(str(arguments[k]) for k in ("BLOCK_N", "BLOCK_V", "BLOCK_D") if k in arguments)
            counted = instructions and shape and case.name in {known.name for known in sass_cases()}
            yield {
                "case": case.name, "kernel": kernel.__name__, "arch": case.arch, "dtype": case.dtype, "tile": shape,
                "variant": case.variant,
                **compile_launch(kernel, arguments, case.arch, instructions=bool(counted)),
            }  # fmt: skip


def write_table(path: Path) -> None:
    rows = [line for line in lines(list(full_cases())) if not line["variant"].startswith("control")]
    text = ",\n".join(json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"triton": "{triton.__version__}", "kernels": [\n{text}\n]}}\n', encoding="utf-8")


def write_candidates(path: Path) -> None:
    """One line per operation, pairs or rows, and tile: what the compiler says of it."""
    rows = []
    for case in candidate_cases():
        for kernel, arguments in launches(case):
            if has_columns(arguments):
                where = {
                    "case": case.name,
                    "operation": case.operation,
                    "paired": case.paired,
                    "tile": case.variant,
                }
                rows.append({**where, **compile_launch(kernel, arguments, case.arch)})
    text = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(
        f'{{"triton": "{triton.__version__}", "arch": "sm_90", "tiles": [\n{text}\n]}}\n', "utf-8"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", default="0/1", help="I/N: every N-th case from the I-th")
    parser.add_argument("--quick", action="store_true", help="the few cases of `make test`")
    parser.add_argument("--full", action="store_true", help="every chip; writes the committed table")
    parser.add_argument("--candidates", action="store_true", help="bench.tune's tiles; writes their table")
    parser.add_argument("--sass", action="store_true", help="instructions of the tiles; writes their table")
    arguments = parser.parse_args()
    if arguments.sass:
        write_sass(sass.COUNTS)
        return
    if arguments.candidates:
        write_candidates(tune.COMPILED)
        return
    if arguments.full:
        write_table(TABLE)
        return
    part, parts = map(int, arguments.part.split("/"))
    selected = list(quick_cases() if arguments.quick else cases())[part::parts]
    for line in lines(selected, instructions=True):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
