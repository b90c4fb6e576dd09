"""The models of a run: where they are read from, what they are by their files, and the one that is in memory."""

from __future__ import annotations

import dataclasses
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sftmix.config import Config, ModelConfig
from sftmix.files import replacing
from sftmix.model.causal_lm import SFTMixModel, install_head, verify_head
from sftmix.model.export import merge_and_export
from sftmix.model.identity import model_identity
from sftmix.model.live import Live
from sftmix.model.load import load_model
from sftmix.model.parallel import World, barrier
from sftmix.model.quantised import check_quantised
from sftmix.model.vocabulary import check_added_tokens
from sftmix.progress import activity, say
from sftmix.rank import is_main
from sftmix.run.folder import RunFolder


class Models:
    """The base model, the reference model and what a run exported; at most one base model is kept in memory."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        device: torch.device,
        world: World,
        *,
        fresh_base: bool = False,
    ) -> None:
        self.config, self.folder, self.device, self.world = config, folder, device, world
        self.keep_base = False  # a run of many stages reads the base model once
        self._fresh_base = fresh_base
        self._live: Live | None = None
        self._ids: dict[tuple[str, str | None, str | None], str] = {}

    @cached_property
    def source(self) -> ModelConfig:
        """Where the base model is read from: its own place, or ``base/`` for a GGUF file, converted once."""
        model = self.config.model
        if model.gguf_file is None:
            return model
        self._convert(model)
        barrier()
        return self._converted(model)

    @property
    def kept_source(self) -> ModelConfig | None:
        """``source`` where nothing has to be converted for it, else None; the model's files are not looked at."""
        model = self.config.model
        if model.gguf_file is None:
            return model
        return self._converted(model) if (self.folder.base / "config.json").is_file() else None

    def _converted(self, model: ModelConfig) -> ModelConfig:
        return dataclasses.replace(model, name=str(self.folder.base), gguf_file=None, revision=None)

    def _convert(self, model: ModelConfig) -> None:
        """Bring a GGUF file into ``base/``, unless it is there; refuse another file's, but for ``--restart all``."""
        note = self.folder.base / "source.json"
        wanted = {"model": self.identity(model), "dtype": model.dtype}
        if note.is_file() and (self.folder.base / "config.json").is_file() and not self._fresh_base:
            try:
                found = json.loads(note.read_text(encoding="utf-8"))
            except ValueError:
                found = None
            if found == wanted:
                return
            if self.folder.record():
                raise ValueError(
                    f"{self.folder.base}: expected the model of {Path(model.name) / (model.gguf_file or '')} in "
                    f"{model.dtype}, got another; take another run folder, or --restart all"
                )
        say(f"reading {model.gguf_file} (once; later stages read {self.folder.base})")
        with activity(f"reading {model.gguf_file}"):
            plain = merge_and_export(*load_model(model), self.folder.base)
        if plain is not None and self.world.mesh is None:
            self._live = Live(self._converted(model), self.adopt(plain))
        if is_main():
            with replacing(note) as temporary:  # last: without it the folder is made again
                temporary.write_text(json.dumps(wanted) + "\n", encoding="utf-8")

    def identity(self, source: ModelConfig) -> str:
        """A hash of the model's files; a converted GGUF file counts as the file itself."""
        if source.name == str(self.folder.base) and self.config.model.gguf_file is not None:
            source = self.config.model
        key = (source.name, source.gguf_file, source.revision)
        if key not in self._ids:
            self._ids[key] = model_identity(source.name, gguf_file=source.gguf_file, revision=source.revision)
        return self._ids[key]

    @cached_property
    def reference(self) -> ModelConfig:
        """The reference model: ``reference.model``, or the model that is trained."""
        other = self.config.reference.model
        if other is None or other == self.config.model.name:
            return self.source
        source = dataclasses.replace(self.config.model, name=other, gguf_file=None, revision=None)
        check_quantised(source, self.config.train.tuning)
        return source

    def load(self, source: ModelConfig, *, trainable: bool) -> SFTMixModel:
        """The model as it was read, checked; ``trainable`` adds adapters where ``train.tuning`` is lora.

        With ``keep_base`` the model that a run's stages begin with is read once: a later stage gets the same one back,
        its weights and adapters as they were.
        """
        if self._live is not None and self._live.source != source:
            self._live = None  # before the next one is read: one base model at a time
        if self._live is None:
            # Processes that share a model read it on the CPU, whose pages of the files they share too.
            device = self.device if self.world.mesh is None else torch.device("cpu")
            with activity(f"loading {source.name}"):
                model, _ = load_model(source, device=device, tuning=self.config.train.tuning)
            self._live = Live(source, model)
        if trainable:
            check_added_tokens(self._live.model, self.config)
        lora = self.config.lora if trainable and self.config.train.tuning == "lora" else None
        fresh = self._live.fresh(
            lora, trainable=trainable, seed=self.config.seed, keep=self.keep_base, export=self.config.export
        )
        if fresh is None:  # another stage left something in it that cannot be taken back
            self._live = None
            return self.load(source, trainable=trainable)
        if not self.keep_base or self.world.mesh is not None:  # training shards it in place
            self._live = None
        return fresh

    def load_alone(self, source: ModelConfig) -> SFTMixModel:
        """The whole model on this process's device, whatever the other processes do."""
        with activity(f"loading {source.name}"):
            return load_model(source, device=self.device, tuning=self.config.train.tuning)[0]

    def adopt(self, plain: Any) -> SFTMixModel:
        """A model that transformers has just read, on this device, with its loss and checked."""
        model = install_head(plain.to(self.device))
        verify_head(model)
        return model

    def forget(self) -> None:
        """Let go of the model that was kept for the next stage."""
        self._live = None

    def source_at(self, folder: Path) -> ModelConfig:
        """An exported model in the run folder, in the run's dtype."""
        return dataclasses.replace(self.config.model, name=str(folder), gguf_file=None, revision=None)
