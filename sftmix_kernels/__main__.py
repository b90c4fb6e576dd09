"""``python -m sftmix_kernels [--json]``: whether this machine is fit for the loss; exit code 1 where it is not."""

from __future__ import annotations

import os
import sys
import warnings


def main(arguments: list[str]) -> int:
    """Say a line at once, import torch, which takes seconds or fails, then examine. One process of many prints."""
    from .doctor.findings import TITLE, WRONG, Finding, first_line, show

    if arguments not in ([], ["--json"]):
        print(f"usage: python -m sftmix_kernels [--json], got {' '.join(arguments)}", file=sys.stderr)
        return 2
    as_json = bool(arguments)
    if os.environ.get("RANK", "0") != "0":
        return 0
    print(TITLE, file=sys.stderr if as_json else sys.stdout, flush=True)
    warnings.filterwarnings("ignore", message=".*Failed to initialize NumPy")  # which torch can do without
    try:
        from .doctor.examine import examine
    except (ImportError, OSError) as problem:
        advice = "install torch anew: pytorch.org/get-started"
        return show(
            TITLE,
            [Finding("torch", f"cannot be imported: {first_line(problem)}", WRONG, advice)],
            as_json=as_json,
        )
    try:
        return examine(as_json=as_json)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
