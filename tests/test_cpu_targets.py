"""CPU targets compare figures of one run only, the newest that has both."""

from __future__ import annotations

import dataclasses

from bench import cpu_targets
from bench.figures import Figure

MIB = 2**20


def figure(
    run_id: str, spec: str, task: str, ms: float | None, mib: float = 1.0, dtype: str = "float32",
    device: str = "a CPU", size: tuple[int, int, int] = (1024, 49152, 576),
) -> Figure:  # fmt: skip
    provider, schedule = spec.split(":")
    return Figure(
        run_id=run_id, commit="abc", device=device, versions={}, command="bench", task=task,
        direction="fwd" if task == "stats" else "fwd_bwd",
        provider=provider, schedule=schedule, lam="", dtype=dtype, N=size[0], V=size[1], D=size[2],
        M=0, threads=1, rounds=3,
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
    assert rows(figures)["our SFTMix / eager torch's NTP alone"] == [
        "1024x49152x576",
        "float32",
        "1.50",
        "1.00",
        "missed",
        "2",
    ]
    assert rows(figures[:2])["our SFTMix / eager torch's NTP alone"][2:] == ["0.50", "1.00", "met", "1"]
    assert set(rows(figures)) == {
        "our SFTMix / eager torch's NTP alone",
        "memory: our SFTMix / 15 % of eager NTP's (16 bits: + 4 V D bytes)",
    }


def test_the_faster_of_two_needs_both() -> None:
    what = "our SFTMix / faster of eager and compiled torch's SFTMix"
    figures = [figure("1", "ours:chunked", "sftmix", 7.0), figure("1", "torch:eager", "sftmix", 20.0)]
    assert what not in rows(figures)
    figures.append(figure("1", "torch_compile:plain", "sftmix", 10.0))
    assert rows(figures)[what][2:5] == ["0.70", "0.80", "met"]


def test_memory_allows_the_float32_dweight_in_16_bits() -> None:
    """15 % of 100 MiB, and 4 V D = 108 MiB."""
    what = "memory: our SFTMix / 15 % of eager NTP's (16 bits: + 4 V D bytes)"
    wide = [figure("1", "ours:chunked", "sftmix", 1.0, 18.4), figure("1", "torch:eager", "ntp", 1.0, 100.0)]
    assert rows(wide)[what][2:5] == ["1.23", "1.00", "missed"]
    half = [dataclasses.replace(item, dtype="bfloat16") for item in wide]
    assert rows(half)[what][2:5] == ["0.15", "1.00", "met"]


def test_ours_against_itself() -> None:
    """Statistics are a forward pass: at most a third; next-token loss is never above SFTMix."""
    figures = [
        figure("1", "ours:chunked", "sftmix", 30.0), figure("1", "ours:chunked", "ntp", 33.0),
        figure("1", "ours:chunked", "stats", 10.0),
    ]  # fmt: skip
    found = rows(figures)
    assert found["our NTP / our SFTMix"][2:5] == ["1.10", "1.00", "missed"]
    assert found["our statistics / our NTP forward and backward"][2:5] == ["0.30", "0.33", "met"]


def test_small_calls_have_rows_of_their_own() -> None:
    mid, call = (128, 4096, 64), (8, 16, 8)
    figures = [
        figure("1", "ours:chunked", "ntp", 3.0, size=mid), figure("1", "torch:eager", "ntp", 1.5, size=mid),
        figure("1", "ours:chunked", "ntp", 0.7, size=call),
    ]  # fmt: skip
    assert rows(figures)["our NTP / eager torch's NTP"][:5] == [
        "128x4096x64",
        "float32",
        "2.00",
        "1.50",
        "missed",
    ]
    assert rows(figures)["milliseconds of our NTP"][2:5] == ["0.70", "1.00", "met"]


def test_sixteen_bits_are_held_against_float32_only_where_they_are_widened() -> None:
    def found(device: str) -> dict[str, list[str]]:
        times = {"float32": 10.0, "bfloat16": 12.0}
        return rows(
            [figure("1", "ours:chunked", "sftmix", ms, dtype=d, device=device) for d, ms in times.items()]
        )

    assert found("Some CPU, 2 cores, AVX2 (restricted)")[cpu_targets.WIDENED][1:5] == [
        "bfloat16",
        "1.20",
        "1.30",
        "met",
    ]
    assert cpu_targets.WIDENED not in found("Some CPU, 2 cores, AVX-512-BF16")


def test_no_figures_give_no_table() -> None:
    assert cpu_targets.table([]) == ""
