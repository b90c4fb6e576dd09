"""``axolotl train`` on several processes of a CPU, where it would ask for as many GPUs: gloo, and no GPU by number."""

from __future__ import annotations

import sys
from typing import Any

from accelerate import PartialState
from axolotl.cli.train import do_cli
from axolotl.core.builders import HFCausalTrainerBuilder
from axolotl.loaders.model import ModelLoader

_device_map, _arguments = ModelLoader._set_device_map_config, HFCausalTrainerBuilder._set_base_training_args


def _without_gpu(self: Any) -> None:
    _device_map(self)
    self.model_kwargs["device_map"] = None


def _on_the_cpu(self: Any, total_num_steps: int) -> Any:
    found, trainer = _arguments(self, total_num_steps)
    return {**found, "use_cpu": True}, trainer


if __name__ == "__main__":
    PartialState(cpu=True)
    ModelLoader._set_device_map_config = _without_gpu
    HFCausalTrainerBuilder._set_base_training_args = _on_the_cpu
    do_cli(sys.argv[1])
