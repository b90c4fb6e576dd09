"""The command line itself: it answers without torch, refuses before it writes, and prints on any output."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What takes seconds to import, and what they bring along.
HEAVY = {
    "torch", "transformers", "peft", "datasets", "accelerate", "triton", "numpy", "pandas", "pyarrow", "matplotlib",
    "safetensors", "tokenizers", "huggingface_hub", "gguf", "tqdm", "sftmix_kernels",
}  # fmt: skip
WATCHED = """
import sys, time
from sftmix import cli
try:
    cli.main()
except SystemExit as end:
    code = end.code
else:
    code = 0
print("modules", *sys.modules, file=sys.stderr)
print("seconds", time.process_time(), file=sys.stderr)
sys.exit(code)
"""
NOTHING_ASKED = {
    "help": (["--help"], 0, "Usage"),
    "no arguments": ([], 2, "Usage"),
    "knobs": (["knobs"], 0, "train.epochs"),
    "help of run": (["run", "--help"], 0, "--run-dir"),
    "help of demo": (["demo", "--help"], 0, "--minutes"),
    "unknown knob": (["run", "--nonsense", "1", "--data", "x", "--model", "y"], 2, "nonsense: unknown knob"),
    "misspelt knob": (
        ["run", "--data", "x", "--model", "y", "--train.epoch", "3"], 2, "did you mean train.epochs?",
    ),
    "value out of range": (["run", "--data", "x", "--model", "y", "--train.epochs=0"], 2, "train.epochs: expected"),
    "no data": (["run", "--model", "y"], 2, "data.train: expected a value"),
    "unknown command": (["tarin", "x"], 2, "tarin"),
    "misspelt knob of a stage": (["score", "folder", "--train.epoch", "3"], 2, "did you mean train.epochs?"),
    "misspelt knob of the demo": (["demo", "--train.epoch", "3"], 2, "did you mean train.epochs?"),
    "no time": (["demo", "--minutes", "0"], 2, "minutes: expected more than 0"),
}  # fmt: skip


def python(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[bytes]:
    settings = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, env=settings, timeout=120
    )


def processor_seconds(done: subprocess.CompletedProcess[bytes]) -> float:
    (line,) = [line for line in done.stderr.decode().splitlines() if line.startswith("seconds ")]
    return float(line.split()[1])


@pytest.mark.parametrize("name", NOTHING_ASKED)
def test_what_needs_no_torch_loads_none_and_writes_nothing(name: str, tmp_path: Path) -> None:
    """Half a second of processor time, none of the packages that take longer, an empty folder left empty."""
    arguments, code, text = NOTHING_ASKED[name]
    done = python("-c", WATCHED, *arguments, cwd=tmp_path)
    output, errors = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == code and text in output + errors, errors
    (modules,) = [line.split()[1:] for line in errors.splitlines() if line.startswith("modules ")]
    assert HEAVY & set(modules) == set()
    assert "sftmix.cli" in modules and len(modules) < 600, len(modules)
    times = [processor_seconds(done)]
    while times[-1] > 0.5 and len(times) < 4:  # a crowded machine makes processor time longer too
        times.append(processor_seconds(python("-c", WATCHED, *arguments, cwd=tmp_path)))
    assert min(times) <= 0.5
    assert list(tmp_path.iterdir()) == []


def test_the_packages_watched_for_are_those_that_the_stages_load() -> None:
    """The list above can fail: what a stage imports is on it."""
    done = python("-c", "import sys, sftmix.run.stages; print(*sys.modules)")
    loaded = set(done.stdout.decode().split())
    assert {"torch", "transformers", "numpy", "pyarrow", "safetensors", "tqdm"} <= HEAVY & loaded


def test_the_demo_speaks_before_torch_is_there() -> None:
    code = (
        "import sys\nfrom sftmix import cli\nfrom sftmix.demo import job\n"
        "def stop(*a, **k): sys.exit('torch' in sys.modules)\n"
        "job.run = stop\nsys.argv[1:] = ['demo']\ncli.main()"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"demo: SmolLM2-135M-Instruct learns")


@pytest.mark.parametrize("arguments", [["knobs"], ["--help"], ["run", "--help"]])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_output_in_any_encoding(arguments: list[str], encoding: str) -> None:
    done = python("-m", "sftmix", *arguments, PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert len(done.stdout.decode(encoding)) > 500


def test_lines_and_errors_in_ascii() -> None:
    """The three dots, the dash of an empty cell and a file's name are not worth a run."""
    code = (
        "from sftmix import process, progress\nfrom rich.table import Table\nprocess.prepare()\n"
        "progress.say('… 8 µs – é')\nt = Table('–')\nt.add_row('é')\nprogress.show(t)\n"
        "with progress.activity('x', every=.01):\n    import time; time.sleep(.1)"
    )
    done = python("-c", code, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and b"? 8 ?s ? ?" in done.stdout and b"? still x" in done.stdout, done.stderr
    done = python("-m", "sftmix", "run", "--dätä", "1", PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and b"unknown knob" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", ["knobs", "--help", "run --help"])
def test_a_reader_that_has_read_enough(arguments: str) -> None:
    """`sftmix knobs | head -1`, unbuffered too: no traceback, no word at exit."""
    for unbuffered in ("", "1"):
        command = f"{sys.executable} -m sftmix {arguments} | head -c 1"
        done = subprocess.run(
            ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], cwd=ROOT, capture_output=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
        assert done.returncode in (0, 1) and done.stderr == b"", done.stderr


def test_no_colour_where_none_is_wanted() -> None:
    for environment in ({}, {"NO_COLOR": "1"}, {"TERM": "dumb"}):
        for arguments in (["knobs"], ["--help"]):
            done = python("-m", "sftmix", *arguments, **{"FORCE_COLOR": "", **environment})
            assert done.returncode == 0 and b"\x1b" not in done.stdout


def test_other_libraries_show_no_bars_off_a_terminal() -> None:
    """tqdm as transformers' GGUF reader, datasets and the hub's client use it."""
    code = (
        "from sftmix import process\nprocess.prepare()\n"
        "from tqdm.auto import tqdm\nfrom huggingface_hub.utils import tqdm as hub\n"
        "import sftmix.run.session\nfrom transformers.utils.logging import tqdm as theirs\n"
        "from datasets.utils import tqdm as data\n"
        "for bar in (tqdm, hub, theirs, data): list(bar(range(3)))"
    )
    done = python("-c", code)
    assert done.returncode == 0 and b"it/s" not in done.stderr and b"\r" not in done.stderr, done.stderr


def test_threads_do_not_spin_for_long_unless_the_user_says_so() -> None:
    code = "import os\nfrom sftmix import process\nprocess.prepare()\nprint(os.environ['GOMP_SPINCOUNT'])"
    assert python("-c", code, GOMP_SPINCOUNT="7").stdout.split() == [b"7"]
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, env=environment)
    assert done.stdout.split() == [b"2000"]


RAISED = """
import sys
from sftmix import cli
def fail():
    {statement}
cli.app = fail
cli.main()
"""


@pytest.mark.parametrize(
    "statement, code, message",
    [
        ("raise OSError(28, 'No space left on device', '/x/y')", 2,
         "sftmix: /x/y: expected to read or write it, got No space left on device: free some space; the same command"),
        ("raise PermissionError(13, 'Permission denied', '/x/y')", 2,
         "sftmix: /x/y: expected to read or write it, got Permission denied: change its permissions, or take another"),
        ("raise ModuleNotFoundError(\"No module named 'peft'\")", 2,
         "sftmix: expected the packages of `pip install '.[recipe]'`, got No module named 'peft': install it"),
        ("import safetensors; raise safetensors.SafetensorError('I/O error: No space left on device')", 2,
         "got I/O error: No space left on device: free some space"),
        ("raise RuntimeError('[enforce fail at inline_container.cc] PytorchStreamWriter failed writing file')", 2,
         "PytorchStreamWriter failed writing file: free some space"),
        ("raise RuntimeError('of ours')", 1, "Traceback"),
    ],
)  # fmt: skip
def test_what_the_machine_refuses_is_one_line(statement: str, code: int, message: str) -> None:
    done = python("-c", RAISED.format(statement=statement))
    error = done.stderr.decode()
    assert done.returncode == code and message in error
    assert len(error.splitlines()) == 1 or code == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    arguments = ["demo", "--run-dir", str(tmp_path / "r")]
    done = python("-m", "sftmix", *arguments)
    assert done.returncode == 2 and str(tmp_path) in done.stderr.decode().splitlines()[-1]
