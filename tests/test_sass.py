"""The counts of compiled kernels: the reading of a disassembly, the bound made of it, and where its figures stand.

tests/kernels/test_compile_matrix.py holds that the committed counts are of the present kernels.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("triton")
from bench import sass
from bench.flow import Flow, instructions
from sftmix_kernels.fused import configs, schedule
from sftmix_kernels.fused.configs import choose_tile, programs_per_processor, torch

COUNTS = json.loads(sass.COUNTS.read_text(encoding="utf-8"))
STEM = {
    "operation": "forward",
    "arch": "sm_90",
    "paired": True,
    "registers": 255,
    "shared": 147584,
    "warps": 8,
}


def listing(*lines: str) -> str:
    """A disassembly of `NAME OPERANDS | STALL` and of labels."""
    text, at = [], 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
            continue
        instruction, stall = line.split(" | ")
        text.append(f"        /*{at:04x}*/  {instruction} ;   /* 0x{at:016x} */")
        text.append(f"                                        /* 0x{int(stall) << 41:016x} */")
        at += 16
    return "\n".join(text)


# Two tiles' loop around the main loop; a branch over what only some tiles do, and code past the end.
KERNEL = listing(
    ".text.kernel:", "S2R R0, SR_TID.X | 1",
    ".L_tile:", "MOV R1, RZ | 2",
    ".L_main:", "@!P1 BRA `(.L_wait) | 5", ".L_back:", "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 | 15",
    "IADD3 R2, R2, 0x40, RZ | 4", "@P0 BRA `(.L_main) | 5",
    "@P2 BRA `(.L_skip) | 5", "FSEL R3, R4, RZ, P3 | 2", "FADD R3, R3, R4 | 4", "STG.E [R6], R3 | 1",
    ".L_skip:", "FMUL R5, R24, R6 | 4", "MUFU.EX2 R5, R5 | 8", "FMNMX R7, R5, R7, !PT | 4",
    "@P4 BRA `(.L_tile) | 5", "EXIT | 5",
    ".L_wait:", "SYNCS.PHASECHK P1, [R8] | 2", "BRA `(.L_back) | 5", ".L_end:", "BRA `(.L_end) | 0",
)  # fmt: skip


def test_each_instruction_has_its_guard_name_labels_and_stall() -> None:
    found = list(instructions(KERNEL))
    assert len(found) == 18
    labels, branch = found[2]
    assert labels == [".L_main"] and (branch.guard, branch.name, branch.stall) == ("@!P1", "BRA", 5)
    assert branch.label == ".L_wait" and not branch.ends
    assert [i.name for _, i in found if i.ends] == ["EXIT", "BRA", "BRA"]
    with pytest.raises(ValueError, match="128-bit"):
        list(instructions("        /*0000*/  MOV R1, RZ ;   /* 0x0000000000000000 */\n        /*0010*/"))


def test_loops_are_found_through_code_out_of_line() -> None:
    flow = Flow.read(KERNEL)
    sizes = sorted(sum(len(flow.blocks[b]) for b in body) for body in flow.loops().values())
    assert sizes == [6, 15]  # the main loop with its wait, and the loop over tiles


def test_a_tile_is_counted_along_its_shortest_path() -> None:
    found = sass.count(KERNEL)
    assert found["loop"]["instructions"] == 4 and found["loop"]["products"] == 1
    assert found["loop"]["stalls"] == 5 + 15 + 4 + 5
    rest = found["rest"]
    assert (rest["instructions"], rest["stalls"]) == (6, 2 + 5 + 4 + 8 + 4 + 5)
    assert (rest["fma"], rest["alu"], rest["mufu"]) == (1, 2, 1)
    assert rest["names"]["MUFU.EX2"] == 1 and "STG" not in rest["names"]
    assert found["static"] == 9


def test_a_program_a_tile_is_counted_from_its_start_to_its_end() -> None:
    once = KERNEL.replace("@P4 BRA `(.L_tile)", "NOP")
    assert sass.count(once)["rest"]["instructions"] == 8


def test_without_products_the_passes_are_counted_and_without_loops_it_is_refused() -> None:
    passes = listing(".L_a:", "MUFU.EX2 R1, R1 | 2", "@P0 BRA `(.L_a) | 5", ".L_b:", "MOV R1, R2 | 1",
                     "MUFU.EX2 R1, R1 | 2", "@P0 BRA `(.L_b) | 5", "EXIT | 5")  # fmt: skip
    assert sass.count(passes) == {"rest": sass.tally(i for _, i in list(instructions(passes))[:5])}
    with pytest.raises(ValueError, match="expected a loop"):
        sass.count(listing("MOV R1, RZ | 1", "EXIT | 5"))


def counted(**changes: Any) -> dict[str, Any]:
    rest = {
        "instructions": 1000,
        "stalls": 900,
        "fma": 500,
        "alu": 100,
        "mufu": 200,
        **changes.pop("rest", {}),
    }
    return {**STEM, "tile": "128x128x64", "loop": {"stalls": 285}, "rest": rest, **changes}


def test_the_bound_by_hand() -> None:
    """Nine steps of 1,024 cycles at D = 576; two warps a scheduler, each with 200 exponentials of 8 cycles."""
    found = sass.bound(counted())
    assert (found["programs"], found["step"]) == (1, 1024)
    assert found["cycles"] == 3200 / 128**2
    assert found["shares"][576] == pytest.approx(9216 / (9216 + 3200))
    assert sass.bound(counted(rest={"stalls": 5000}))["shares"][576] == pytest.approx(9216 / (9216 + 5000))
    two = counted(tile="64x128x64", warps=4, shared=98304)
    assert sass.bound(two)["programs"] == 2 and sass.bound(two)["shares"][576] == 1
    assert sass.bound({**two, "rest": {**two["rest"], "stalls": 9216}})["shares"][576] == pytest.approx(2 / 3)


def test_the_page_is_of_the_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: Any) -> None:
    assert sass.main(["--check"]) == 0, "run `python -m bench.sass --write`"
    assert sass.main([]) == 0 and capsys.readouterr().out.startswith("# What the compiled kernels")
    monkeypatch.setattr(sass, "PAGE", tmp_path / "page.md")
    sass.PAGE.write_text("another page", encoding="utf-8")
    assert sass.main(["--check"]) == 1


def test_every_tile_of_the_tables_is_counted_and_keeps_off_the_stack() -> None:
    found = {(line["arch"], line["operation"], line["paired"], line["variant"]) for line in COUNTS["kernels"]}
    for arch in sass.TENSOR_RATE:
        for operation in configs.OPERATIONS:
            for paired in (True, False):
                assert {(arch, operation, paired, v) for v in ("plain", "bias", "softcap")} <= found
    for line in COUNTS["kernels"]:
        assert line["stack"] <= 64 and not line["notes"], line


def test_the_cost_model_has_the_counted_cycles_and_programs() -> None:
    for (arch, operation, paired), cycles in sass.cycles(COUNTS).items():
        assert schedule._CYCLES[arch][operation][0 if paired else 1] == cycles, (arch, operation, paired)
    for line in COUNTS["kernels"]:
        if line["variant"] == "plain" and line["operation"] != "stored":
            tile = choose_tile(
                line["operation"], num_rows=4096, vocab_size=128256, hidden_size=4096, dtype=torch.bfloat16,
                arch=line["arch"], paired=line["paired"],
            )  # fmt: skip
            assert line["tile"] == f"{tile.block_n}x{tile.block_v}x{tile.block_d}"
            assert min(sass.bound(line)["programs"], 2) == programs_per_processor(tile), line


def test_no_compiler_takes_the_maximum_from_an_unrounded_logit() -> None:
    """cap * t - m is two operations: beside the plain kernel's additions a cap has the two of each of 192 tanh."""
    added = {
        line["variant"]: line["rest"]["names"]["FADD"] for line in COUNTS["kernels"]
        if (line["operation"], line["arch"], line["paired"]) == ("forward", "sm_90", True)
    }  # fmt: skip
    assert added["softcap"] >= added["plain"] + 2 * 192


def test_the_forward_of_pairs_leaves_the_exponentials_as_its_bound() -> None:
    """Of 64 pairs and columns a thread: 192 exponentials, and fewer than 26 instructions each in all."""
    (line,) = (
        line for line in COUNTS["kernels"]
        if (line["operation"], line["arch"], line["paired"], line["variant"]) == ("forward", "sm_90", True, "plain")
    )  # fmt: skip
    rest = line["rest"]
    assert rest["mufu"] < 1.05 * 192 and rest["instructions"] < 26 * 64
    assert sass.bound(line)["cycles"] * 128**2 == pytest.approx(2 * 8 * rest["mufu"], rel=0.02)
