"""The README's picture and table of the demo: small, opaque, and the figures that the run itself reports."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from bench import machine, pictures
from sftmix.config import load_config, save_config
from sftmix.evaluation.plots import plot_data_map
from sftmix.run.folder import RunFolder
from sftmix.run.report import results_table
from sftmix.scores.confidence import make_split
from sftmix.scores.dynamics import Dynamics

EVALUATION = {
    "base": {
        "nll": 2.5,
        "perplexity": 12.182,
        "token_accuracy": 0.41,
        "num_examples": 64,
        "num_tokens": 2048,
    },
    "ntp": {"nll": 1.75, "perplexity": 5.755, "token_accuracy": 0.55, "num_examples": 64, "num_tokens": 2048},
    "sftmix": {
        "nll": 1.7123,
        "perplexity": 5.542,
        "token_accuracy": 0.5625,
        "num_examples": 64,
        "num_tokens": 2048,
    },
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run's files, made by hand, and a README and a folder of pictures that may be written."""
    folder = tmp_path / "run"
    draw = np.random.default_rng(0)
    nll = draw.gamma(2.0, 0.6, (1, 400)) + draw.uniform(0, 0.4, (3, 400))
    tokens = draw.integers(3, 40, (3, 400))
    dynamics = Dynamics(
        examples=[f"e{i}" for i in range(400)], step=np.zeros((3, 400), np.int64), nll_sum=nll * tokens,
        num_tokens=tokens, top1_share=np.exp(-nll), source="checkpoint",
    )  # fmt: skip
    (folder / "plots").mkdir(parents=True)
    plot_data_map(dynamics, make_split(dynamics), folder / "plots" / "data_map.png")
    (folder / "dynamics.parquet").write_bytes(b"")
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    for method, mixed in (("ntp", 0), ("sftmix", 90)):
        (folder / f"train-{method}").mkdir()
        lines = [
            {"step": step, "num_tokens": 1000 + step, "num_mixed": mixed, "seconds": 1.25, "mixup_loss": 1.0}
            for step in (1, 2, 3)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"train-{method}" / "metrics.jsonl").write_text(text)
    flags = [
        f"run_dir={folder}",
        "model.name=m",
        "data.train=d.jsonl",
        "data.limit=400",
        "model.dtype=float32",
    ]
    save_config(load_config(None, flags), folder / "config.yaml")
    monkeypatch.setattr(pictures, "ROOT", tmp_path)
    monkeypatch.setattr(pictures, "FOLDER", tmp_path / "bench" / "pictures")
    monkeypatch.setattr(pictures, "README", tmp_path / "README.md")
    begin, end = pictures.MARKERS
    (tmp_path / "README.md").write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    return folder


def test_the_picture_is_small_opaque_and_as_wide_as_a_page(run: Path) -> None:
    assert pictures.main([str(run)]) == 0
    path = pictures.FOLDER / "data_map.png"
    assert path.stat().st_size <= pictures.MOST_BYTES <= 60_000
    with Image.open(path) as image:
        assert image.width == 900 and 500 < image.height < 650
        assert "transparency" not in image.info and image.mode in ("P", "RGB")
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels[0] == 255).all() and (pixels[:, 0] == 255).all()  # white around: readable on a dark page
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 16  # the colours of the map are still there


def test_a_transparent_picture_is_laid_on_white(tmp_path: Path) -> None:
    source, target = tmp_path / "a.png", tmp_path / "b.png"
    Image.new("RGBA", (1200, 600), (0, 0, 0, 0)).save(source)
    assert pictures.shrink(source, target)["width"] == 900
    with Image.open(target) as image:
        assert image.convert("RGBA").getpixel((10, 10)) == (255, 255, 255, 255)


def test_a_picture_that_stays_large_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"b\.png: expected at most 60000 bytes, got"):
        pictures.shrink(tmp_path / "a.png", tmp_path / "b.png")


def test_the_table_has_the_cells_of_the_runs_own(run: Path) -> None:
    """Figures are read twice, by the recipe's report and by bench, which imports nothing of the recipe."""
    assert pictures.main([str(run)]) == 0
    screen = io.StringIO()
    Console(file=screen, width=200).print(results_table(RunFolder(run)))
    theirs = [
        [cell.strip() for cell in line.strip("│ ").split("│")]
        for line in screen.getvalue().splitlines()
        if "│" in line
    ]
    readme = pictures.README.read_text(encoding="utf-8")
    ours = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in readme.splitlines()
        if line.startswith("| ")
    ]
    assert len(theirs) == len(ours) - 1 == 3
    for expected, row in zip(theirs, ours[1:], strict=True):
        assert row[1:] == [*expected[1:3], *expected[4:]]  # all but the number of mixed pairs
    assert [row[0] for row in ours[1:]] == ["base model", "next-token", "SFTMix"]
    assert ours[3] == ["SFTMix", "3", "3,006", "4", "1.7123", "5.542", "56.25%"]


def test_the_block_says_where_it_comes_from(run: Path) -> None:
    assert (
        pictures.main([str(run), "--command", "make demo DEMO_ARGS=x", "--note", "It was stopped once."]) == 0
    )
    found = json.loads((pictures.FOLDER / "data_map.json").read_text())
    assert found["device"] and found["commit"] and found["versions"] == machine.versions()
    text = " ".join(pictures.README.read_text(encoding="utf-8").split())
    for part in (
        found["device"],
        found["commit"],
        "make demo DEMO_ARGS=x",
        "float32",
        "400 training examples",
        "2,048 tokens",
    ):
        assert part in text
    assert "It was stopped once." in text
    assert text.startswith("before") and text.endswith("after") and " old " not in text
    assert "(bench/pictures/data_map.png)" in text


def test_the_data_type_is_that_of_the_weights_not_of_the_setting(run: Path) -> None:
    """model.dtype may leave the choice to the machine; the exported model says what came of it."""
    assert pictures.figures(run)["dtype"] == "float32"
    (run / "train-sftmix" / "model").mkdir()
    (run / "train-sftmix" / "model" / "config.json").write_text(json.dumps({"dtype": "bfloat16"}))
    assert pictures.figures(run)["dtype"] == "bfloat16"


def test_check_sees_a_changed_figure(run: Path, capsys: Any) -> None:
    assert pictures.main([str(run)]) == 0 and pictures.main(["--check"]) == 0
    readme = pictures.README
    readme.write_text(readme.read_text(encoding="utf-8").replace("1.7123", "1.6123"), encoding="utf-8")
    assert pictures.main(["--check"]) == 1 and "python -m bench.pictures" in capsys.readouterr().err
    assert pictures.main([]) == 0 and pictures.main(["--check"]) == 0


def test_check_sees_a_picture_that_is_not_the_one_described(run: Path, capsys: Any) -> None:
    assert pictures.main([str(run)]) == 0
    path = pictures.FOLDER / "data_map.png"
    path.write_bytes(path.read_bytes() + b"x")
    assert pictures.main(["--check"]) == 1 and "data_map.png" in capsys.readouterr().err


def test_an_unfinished_run_is_refused_by_name(run: Path, capsys: Any) -> None:
    (run / "evaluation.json").unlink()
    with pytest.raises(SystemExit) as stopped:
        pictures.main([str(run)])
    assert stopped.value.code == 2
    assert (
        "expected a finished run" in capsys.readouterr().err
        and not (pictures.FOLDER / "data_map.json").exists()
    )


def test_the_readme_is_that_of_the_committed_run() -> None:
    assert pictures.main(["--check"]) == 0, "run `python -m bench.pictures`"
