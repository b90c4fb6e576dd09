"""What test_sharded_loading runs under torchrun: a model read and sharded, and the memory that it took meanwhile.

Counted is anonymous memory, which the system cannot take back; pages of files are shared by the processes of a machine.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sftmix.config import ModelConfig
from sftmix.model.load import load_model
from sftmix.model.parallel import join_world, shard


def anonymous() -> int:
    """Bytes of this process's anonymous memory."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def main(model: str, warm: str, out: Path) -> None:
    world = join_world(torch.device("cpu"))
    shard(load_model(ModelConfig(name=warm, dtype="bfloat16"))[0], world)  # the libraries' own memory
    before = anonymous()
    most, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], anonymous())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    loaded = load_model(ModelConfig(name=model, dtype="bfloat16"))[0]
    numbers = sum(p.numel() for p in loaded.parameters())
    read = anonymous()
    sharded = shard(loaded, world)
    del loaded
    done.set()
    thread.join()
    held = sum(p.to_local().untyped_storage().nbytes() for p in sharded.parameters())  # type: ignore[attr-defined]
    told: dict[str, Any] = {
        "numbers": numbers, "read": read - before, "peak": most[0] - before, "end": anonymous() - before, "held": held,
    }  # fmt: skip
    (out / f"rank{world.rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
