"""The README's small table: one run a kind of processor, kinds never mixed, ratios and marks that are right."""

from __future__ import annotations

import dataclasses

import pytest

from bench import machine
from bench.figures import Figure, read_figures
from bench.report import README, RESULTS, tables
from bench.summary import chosen, summary
from sftmix_kernels.hardware import ProductSupport

MIB = 2**20
AVX512, AVX2, OLD = (f"A CPU, 2 cores{end}" for end in (", AVX-512-BF16", ", AVX2 (restricted)", ""))


def figure(
    device: str, spec: str, task: str, ms: float | None, dtype: str = "bfloat16", **changes: object
) -> Figure:
    provider, schedule = spec.split(":")
    made = Figure(
        run_id="1", commit="abc123", device=device, versions={"torch": "2.13"}, command="bench", task=task,
        direction="fwd_bwd", provider=provider, schedule=schedule, lam="row" if task == "sftmix" else "", dtype=dtype,
        N=1024, V=49152, D=576, M=0, threads=2, rounds=3, ms_median=ms, ms_min=ms, extra_peak_bytes=10 * MIB,
        peak_bytes=0, error=None if ms else "failed",
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def whole(device: str, dtype: str, *, run_id: str = "1", ours: float = 600.0) -> list[Figure]:
    """A run that has ours, eager and compiled torch; NTP then SFTMix of each."""
    times = {
        "ours:chunked": (ours, ours),
        "torch:eager": (800.0, 1200.0),
        "torch_compile:plain": (500.0, 750.0),
    }
    return [
        figure(device, spec, task, ms, dtype, run_id=run_id)
        for spec, pair in times.items()
        for task, ms in zip(("ntp", "sftmix"), pair, strict=True)
    ]


def words(text: str) -> str:
    return " ".join(text.split())


def rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()[2:]
        if line[:1] == "|"
    ]


def test_each_kind_of_processor_has_its_rows_in_the_dtype_it_trains_in() -> None:
    everything = [
        item
        for device in (AVX512, AVX2)
        for dtype in ("bfloat16", "float32")
        for item in whole(device, dtype)
    ]
    text = summary(everything)
    prose = words(text)
    assert [row[0] for row in rows(text) if row[0]] == [f"{AVX512}, bfloat16", f"{AVX2}, float32"]
    assert [row[1] for row in rows(text)] == ["ours", "eager torch", "compiled torch"] * 2
    assert rows(text)[0][2:] == ["600", "10", "600", "10"]
    assert "On AVX-512-BF16 in bfloat16 our whole SFTMix loss takes 0.75 of the time of eager" in prose
    assert "On AVX2 (restricted) in float32" in prose
    assert text.count("commit abc123") == 2


def test_ratios_are_those_of_one_run() -> None:
    """A newer run of ours alone changes nothing; a newer whole one replaces the table."""
    alone = [figure(AVX2, "ours:chunked", task, 1.0, "float32", run_id="2") for task in ("ntp", "sftmix")]
    assert rows(summary([*whole(AVX2, "float32"), *alone]))[0][2] == "600"
    newer = [*whole(AVX2, "float32"), *alone, *whole(AVX2, "float32", run_id="3", ours=400.0)]
    assert rows(summary(newer))[0][2] == "400"
    assert "0.50 of the time of eager torch's next-token loss alone, 0.80 of compiled" in words(
        summary(newer)
    )


def test_marks_of_a_loss_that_is_off_and_of_another_run() -> None:
    plain = figure(
        AVX512, "torch_linear_ce:plain", "ntp", 700.0, run_id="2", caveat="loss 12.75 where 12.8 is right"
    )
    failed = figure(AVX512, "torch_linear_ce:chunked", "ntp", None, run_id="2")
    text = summary([*whole(AVX512, "bfloat16"), plain, failed])
    assert rows(text)[3] == ["", "torch's `linear_cross_entropy`", "700†‡", "10", "–", "–"]
    assert "†: its loss is slightly off" in words(text) and "‡: from another run" in words(text)
    assert "†" not in summary(whole(AVX512, "bfloat16")) and "‡" not in summary(whole(AVX512, "bfloat16"))


def test_results_without_an_instruction_set_are_read_and_give_way() -> None:
    old = whole(OLD, "bfloat16")
    assert not old[0].on_gpu and old[0].instruction_set == ""
    assert [part[0].device for part in chosen(old)] == [OLD]
    assert [part[0].device for part in chosen([*old, *whole(AVX2, "float32")])] == [AVX2]


def test_a_gpu_is_a_kind_of_its_own() -> None:
    changes = {"N": 8192, "V": 128256, "D": 4096}
    gpu = [dataclasses.replace(item, **changes) for item in whole("NVIDIA H200", "bfloat16")]
    gpu = [dataclasses.replace(f, schedule="default") if f.provider == "ours" else f for f in gpu]
    assert gpu[0].on_gpu and gpu[0].instruction_set == ""
    text = summary([*whole(AVX2, "float32"), *gpu])
    assert {row[0] for row in rows(text)} == {"", f"{AVX2}, float32", "NVIDIA H200, bfloat16"}


def test_ours_on_a_gpu_are_the_triton_kernels() -> None:
    gpu = {"N": 8192, "V": 128256, "D": 4096}
    figures = [dataclasses.replace(each, **gpu) for each in whole("NVIDIA H100", "bfloat16", ours=800.0)]
    ours = [
        figure("NVIDIA H100", spec, task, ms, **gpu)
        for task in ("ntp", "sftmix") for spec, ms in (("ours:stored", 41.0), ("ours:recompute", 55.0))
    ]  # fmt: skip
    assert "| ours | 41 | 10 | 41 | 10 |" in summary([*figures, *ours])
    assert "| ours |" not in summary(figures)  # ``chunked`` alone


def test_tables_of_two_instruction_sets_are_two() -> None:
    both = [*whole(AVX512, "float32"), *whole(AVX2, "float32", run_id="2")]
    assert tables(both).count("**N = 1024, V = 49152, D = 576, float32**") == 2
    assert tables(both).count("**Targets on A CPU, 2 cores") == 2


def test_nothing_measured_gives_no_table() -> None:
    assert summary([]) == "No figures yet."


@pytest.mark.parametrize(
    "capability,products,amx,environment,name",
    [
        ("AVX512", True, False, {}, "AVX-512-BF16"),
        ("AVX512", True, True, {}, "AVX-512-AMX"),
        ("AVX512", False, False, {}, "AVX-512"),
        ("AVX2", False, False, {}, "AVX2"),
        (
            "AVX2",
            False,
            False,
            {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
            "AVX2 (restricted)",
        ),
    ],
)
def test_a_cpu_is_named_with_what_it_may_use(
    monkeypatch: pytest.MonkeyPatch,
    capability: str,
    products: bool,
    amx: bool,
    environment: dict[str, str],
    name: str,
) -> None:
    monkeypatch.setattr(machine.torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(machine.torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(machine, "product_support", lambda dtype, device: ProductSupport(products, "said so"))
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    for variable in machine.RESTRICTIONS:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert machine.instruction_set() == name
    assert machine.device_name("cpu").endswith(f" cores, {name}")
    held = "".join(f"{variable}={value} " for variable, value in environment.items())
    assert (
        machine.command_line("bench.loss", ["--shapes", "cpu"]) == f"{held}python -m bench.loss --shapes cpu"
    )


def test_the_readme_says_what_was_measured_on_every_kind() -> None:
    readme = " ".join(README.read_text(encoding="utf-8").split())
    kinds = {part[0].instruction_set or part[0].device for part in chosen(read_figures(RESULTS))}
    assert {"AVX-512-BF16", "AVX2 (restricted)"} <= kinds
    for kind in kinds:
        assert f"On {kind} in " in readme
