"""CPU targets compare figures of one run only, the newest that has both."""

from __future__ import annotations

import dataclasses

from bench import cpu_targets
from bench.figures import Figure

MIB = 2**20


def figure(
    run_id: str, spec: str, task: str, ms: float | None, mib: float = 1.0, dtype: str = "float32"
) -> Figure:
    provider, schedule = spec.split(":")
    return Figure(
        run_id=run_id, commit="abc", device="a CPU", versions={}, command="bench", task=task, direction="fwd_bwd",
        provider=provider, schedule=schedule, lam="", dtype=dtype, N=4, V=MIB, D=2, M=0, threads=1, rounds=3,
        ms_median=ms, ms_min=ms, extra_peak_bytes=int(mib * MIB), peak_bytes=0, error=None if ms else "failed",
    )  # fmt: skip


def rows(figures: list[Figure]) -> dict[str, list[str]]:
    """Cells by the first one."""
    lines = cpu_targets.table(figures).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {line[0]: line[1:] for line in cells}


def test_ratios_of_the_newest_run_that_has_both() -> None:
    figures = [
        figure("1", "ours:chunked", "sftmix", 10.0), figure("1", "torch:eager", "ntp", 20.0),
        figure("2", "ours:chunked", "sftmix", 30.0), figure("2", "torch:eager", "ntp", 20.0),
        figure("3", "ours:chunked", "sftmix", 1.0), figure("3", "torch:eager", "ntp", None),
        figure("4", "torch:eager", "ntp", 99.0),
    ]  # fmt: skip
    assert rows(figures)["eager torch's NTP alone"] == [
        f"4x{MIB}x2",
        "float32",
        "1.50",
        "1.00",
        "missed",
        "2",
    ]
    assert rows(figures[:2])["eager torch's NTP alone"][2:] == ["0.50", "1.00", "met", "1"]
    assert set(rows(figures)) == {
        "eager torch's NTP alone",
        "memory: 15 % of eager NTP's (16 bits: + 4 V D bytes)",
    }


def test_the_faster_of_two_needs_both() -> None:
    what = "faster of eager and compiled torch's SFTMix"
    figures = [figure("1", "ours:chunked", "sftmix", 7.0), figure("1", "torch:eager", "sftmix", 20.0)]
    assert what not in rows(figures)
    figures.append(figure("1", "torch_compile:plain", "sftmix", 10.0))
    assert rows(figures)[what][2:5] == ["0.70", "0.80", "met"]


def test_memory_allows_the_float32_dweight_in_16_bits() -> None:
    """15 % of 100 MiB, and 4 V D = 8 MiB."""
    what = "memory: 15 % of eager NTP's (16 bits: + 4 V D bytes)"
    wide = [figure("1", "ours:chunked", "sftmix", 1.0, 18.4), figure("1", "torch:eager", "ntp", 1.0, 100.0)]
    assert rows(wide)[what][2:5] == ["1.23", "1.00", "missed"]
    half = [dataclasses.replace(item, dtype="bfloat16") for item in wide]
    assert rows(half)[what][2:5] == ["0.80", "1.00", "met"]


def test_no_figures_give_no_table() -> None:
    assert cpu_targets.table([]) == ""
