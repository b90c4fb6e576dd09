"""How the processes of torchrun find each other, also after one of them died and all were started again.

torchrun keeps one store over restarts, and torch's backends leave their addresses in it under names that do not change
(pytorch 167288): a second attempt connects to processes of the first, and fails or waits for hours. The count of
restarts that torchrun gives is each node's own (pytorch 108158). So the first process gives every attempt a name.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

# How long a process waits for the others, in every group: the main one tokenises, exports and writes answers.
PATIENCE = timedelta(hours=2)
_POLL = 0.01  # seconds


def join(backend: str) -> None:
    """Join the process group that torchrun describes."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=PATIENCE)
        return
    store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
    own = dist.PrefixStore(attempt_name(store, rank, size), store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=PATIENCE)


def attempt_name(store: dist.Store, rank: int, size: int) -> str:
    """A name that all processes of this attempt share and no earlier one had.

    Each says hello with a token of its own; the first answers every token that it sees, those that an earlier attempt
    left too, until all others have taken up its answer.
    """
    token = uuid.uuid4().hex
    if rank:
        store.set(f"sftmix/hello/{rank}", token)
        name = store.get(f"sftmix/answer/{token}").decode()
        store.add(f"sftmix/taken/{name}", 1)
        return name
    seen: dict[int, bytes] = {}
    while store.add(f"sftmix/taken/{token}", 0) < size - 1:
        for other in range(1, size):
            if store.check([f"sftmix/hello/{other}"]):
                hello = store.get(f"sftmix/hello/{other}")
                if seen.get(other) != hello:
                    store.set(f"sftmix/answer/{hello.decode()}", token)
                    seen[other] = hello
        time.sleep(_POLL)
    return token
