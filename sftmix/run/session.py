"""What the stages of one run share: its configuration, examples, tokenizer and models, each made when first asked."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers.utils.logging import disable_progress_bar

from sftmix.config import Config, ModelConfig
from sftmix.data.digest import examples_digest
from sftmix.data.heldout import check_sources, overlap, split_heldout
from sftmix.data.prepare import Source, remove
from sftmix.data.rows import Example
from sftmix.data.store import Chosen, TokenStore
from sftmix.data.summary import first_object, lines
from sftmix.data.tokenized import TokenizedExample
from sftmix.data.tokens import TokenOptions
from sftmix.files import replacing
from sftmix.model.causal_lm import SFTMixModel
from sftmix.model.dtype import settle_dtype
from sftmix.model.export import merge_and_export
from sftmix.model.identity import model_identity
from sftmix.model.load import load_model
from sftmix.model.lora import apply_lora
from sftmix.model.parallel import join_world, local_device
from sftmix.progress import activity, say
from sftmix.rank import is_main
from sftmix.run.folder import RunFolder, Settings, stages_from
from sftmix.run.inputs import (
    heldout_source,
    prepared,
    settle_date,
    token_options,
    tokenizer_for,
    train_source,
)

logging.getLogger("transformers.modeling_gguf_pytorch_utils").setLevel(logging.ERROR)
disable_progress_bar()  # transformers' bars for reading and writing files; the stages have their own


class Session:
    """One run folder being worked on; under torchrun, by every process together."""

    def __init__(self, config: Config, *, restart: str | None = None) -> None:
        self._fresh_base = restart == "all"
        self._made: set[Path] = (
            set()
        )  # files of tokenised examples that this session wrote, and all that it reads
        self._used: set[Path] = set()
        self._model_ids: dict[tuple[str, str | None, str | None], str] = {}
        self.device = local_device()
        self.world = join_world(self.device)
        self.config = config = settle_date(settle_dtype(config, self.device))
        self.folder = RunFolder(config.run_dir)

    # --- examples ---

    def _prepared(self, source: Source, tokenizer: Any, model: ModelConfig) -> TokenStore:
        """The tokenised examples of a source: made by the main process, read by all."""
        options = token_options(self.config, model)
        before = set(self.folder.tokens.glob("*.arrow"))
        if is_main():
            with activity(f"reading and tokenising {source.name}"):
                store = prepared(self.config, source, tokenizer, options, self.folder.tokens)
            self._made |= {store.path} - before
        self.barrier()
        if not is_main():
            store = prepared(self.config, source, tokenizer, options, self.folder.tokens, anew=False)
        self._used.add(store.path)
        return store

    def take_back(self) -> None:
        """Remove the tokenised examples that this session made: a start that is refused leaves the folder as it was."""
        for path in self._made:
            remove(path)
        self._made.clear()

    @cached_property
    def _train_store(self) -> TokenStore:
        return self._prepared(train_source(self.config), self.tokenizer, self.model_source)

    @cached_property
    def _reference_store(self) -> TokenStore:
        """The training examples in the reference model's tokens."""
        if self.reference_source == self.model_source:
            return self._train_store
        tokenizer = tokenizer_for(self.config, self.reference_source)
        return self._prepared(train_source(self.config), tokenizer, self.reference_source)

    @cached_property
    def _heldout_store(self) -> TokenStore | None:
        """The held-out examples of their own source; None where they are a part of the training examples."""
        source = heldout_source(self.config)
        if source is None:
            return None
        check_sources(self.config.data)
        return self._prepared(source, self.tokenizer, self.model_source)

    @cached_property
    def _names(self) -> tuple[list[str], list[str]]:
        """Ids of the training and of the held-out examples."""
        data, theirs = self.config.data, self._heldout_store
        ours = self._train_store.named()
        train, heldout = (
            split_heldout(ours, data.heldout_fraction) if theirs is None else (ours, theirs.named())
        )
        shared = overlap(train, heldout)
        for line in shared.lines():
            say(line)
        shared.check(train=data.train, heldout=data.heldout or "its part", allowed=data.allow_overlap)
        usable = [named.id for named in train if named.id in self._reference_store]
        if len(usable) < len(train):
            say(
                f"data: {len(train) - len(usable)} training examples are left out, the reference model cannot use them"
            )
        return usable, [named.id for named in heldout[: self.config.evaluate.limit]]

    @cached_property
    def train(self) -> Mapping[str, TokenizedExample]:
        """The training examples by id, for the model that is trained."""
        return Chosen(self._train_store, self._names[0])

    @cached_property
    def heldout(self) -> list[TokenizedExample]:
        """The held-out examples, at most ``evaluate.limit``."""
        store = self._heldout_store or self._train_store
        return [store[name] for name in self._names[1]]

    def heldout_examples(self, count: int) -> list[Example]:
        """The first held-out conversations as they were read."""
        wanted = dict.fromkeys(self._names[1][:count])
        found: dict[str, Example] = {}
        for example in (heldout_source(self.config) or train_source(self.config)).examples():
            if len(found) == len(wanted):
                break
            if example.id in wanted:
                found[example.id] = example
        return [found[name] for name in wanted]

    @cached_property
    def train_id(self) -> str:
        """A hash of the training examples' tokens, masks and weights."""
        return examples_digest(self.train)

    @cached_property
    def reference_id(self) -> str:
        """The same of the training examples in the reference model's tokens."""
        return examples_digest(self.reference_examples)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that were trained to end an answer, the most frequent first."""
        return tuple(token for token, count in self._train_store.ends if count)

    @cached_property
    def token_options(self) -> TokenOptions:
        """How examples become tokens for the model that is trained."""
        return token_options(self.config, self.model_source)

    def tell_data(self) -> None:
        """Say what became of the rows, and write it to the run folder."""
        stores = {"train": self._train_store, "heldout": self._heldout_store}
        if not is_main():
            return
        told = {}
        for name, store in stores.items():
            if store is not None:
                for line in lines(store.account, store):
                    say(f"{name} {line}" if not line.startswith("  ") else line)
                told[name] = first_object(store.account)
        for path in set(self.folder.tokens.glob("*.arrow")) - self._used:
            path.unlink()  # of settings that were left behind
        with replacing(self.folder.data) as temporary:
            temporary.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    # --- models ---

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the model that is trained, with the configured chat template."""
        return tokenizer_for(self.config, self.model_source)

    @cached_property
    def pad_id(self) -> int:
        """Any valid token: padding is masked and bears no loss."""
        return int(self.tokenizer.pad_token_id or 0)

    @cached_property
    def model_source(self) -> ModelConfig:
        """Where the base model is read from: its own place, or ``base/`` for a GGUF file, converted once."""
        model = self.config.model
        if model.gguf_file is None:
            return model
        self._convert(model)
        self.barrier()
        return dataclasses.replace(model, name=str(self.folder.base), gguf_file=None, revision=None)

    def _convert(self, model: ModelConfig) -> None:
        """Bring a GGUF file into ``base/``, unless it is there; refuse another file's, but for ``--restart all``."""
        note = self.folder.base / "source.json"
        wanted = {"model": self.model_id(model), "dtype": model.dtype}
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
            merge_and_export(*load_model(model), self.folder.base)
        if is_main():
            with replacing(note) as temporary:  # last: without it the folder is made again
                temporary.write_text(json.dumps(wanted) + "\n", encoding="utf-8")

    def model_id(self, source: ModelConfig) -> str:
        """A hash of the model's files; a converted GGUF file counts as the file itself."""
        if source.name == str(self.folder.base) and self.config.model.gguf_file is not None:
            source = self.config.model
        key = (source.name, source.gguf_file, source.revision)
        if key not in self._model_ids:
            self._model_ids[key] = model_identity(
                source.name, gguf_file=source.gguf_file, revision=source.revision
            )
        return self._model_ids[key]

    @cached_property
    def reference_source(self) -> ModelConfig:
        """The reference model: ``reference.model``, or the model that is trained."""
        other = self.config.reference.model
        if other is None or other == self.config.model.name:
            return self.model_source
        return dataclasses.replace(self.config.model, name=other, gguf_file=None, revision=None)

    @cached_property
    def reference_examples(self) -> Mapping[str, TokenizedExample]:
        """The training examples in the reference model's tokens."""
        return Chosen(self._reference_store, self._names[0])

    def load(self, source: ModelConfig, *, trainable: bool) -> SFTMixModel:
        """The model, checked; ``trainable`` adds adapters where ``train.tuning`` is lora."""
        with activity(f"loading {source.name}"):
            model, _ = load_model(source, device=self.device)
        if trainable and self.config.train.tuning == "lora":
            return apply_lora(model, self.config.lora, seed=self.config.seed)
        return model

    def source_at(self, folder: Path) -> ModelConfig:
        """An exported model in the run folder, in the run's dtype."""
        return dataclasses.replace(self.config.model, name=str(folder), gguf_file=None, revision=None)

    def with_method(self, method: str) -> Config:
        """The configuration with another ``train.method``."""
        return dataclasses.replace(self.config, train=dataclasses.replace(self.config.train, method=method))

    # --- processes and settings ---

    def barrier(self) -> None:
        """Wait for the other processes, if there are any."""
        if dist.is_initialized():
            dist.barrier()

    def finish(self, stage: str, settings: Settings, about: Settings) -> None:
        """Record a finished stage, once all processes are done with it."""
        self.barrier()
        if is_main():
            self.folder.note(stage, "finished", settings, about)
        self.barrier()

    def restart(self, stage: str) -> None:
        """Remove the files and records of ``stage`` and of all stages after it, saying which."""
        self.barrier()
        if is_main():
            removed = self.folder.remove(stages_from(stage))
            say(f"restart {stage}: removed {', '.join(removed) or 'nothing, nothing was there'}")
        self.barrier()
