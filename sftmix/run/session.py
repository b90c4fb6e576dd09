"""What the stages of one run share: its configuration, examples, tokenizer and models, each made when first asked."""

from __future__ import annotations

import dataclasses
import json
import logging
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from sftmix.config import Config, ModelConfig
from sftmix.data.chat import TokenizedExample, tokenize_examples, use_chat_template
from sftmix.data.examples import Example, load_examples
from sftmix.data.heldout import check_sources, overlap, split_heldout
from sftmix.data.identity import examples_digest
from sftmix.data.stops import stop_ids
from sftmix.files import replacing
from sftmix.model.causal_lm import SFTMixModel, load_model
from sftmix.model.dtype import settle_dtype
from sftmix.model.export import merge_and_export
from sftmix.model.identity import model_identity
from sftmix.model.lora import apply_lora
from sftmix.model.parallel import join_world, local_device
from sftmix.progress import activity, say
from sftmix.rank import is_main
from sftmix.run.folder import RunFolder, Settings, stages_from

logging.getLogger("transformers.modeling_gguf_pytorch_utils").setLevel(logging.ERROR)
disable_progress_bar()  # transformers' bars for reading and writing files; the stages have their own


class Session:
    """One run folder being worked on; under torchrun, by every process together."""

    def __init__(self, config: Config, *, restart: str | None = None) -> None:
        self._fresh_base = restart == "all"
        self._model_ids: dict[tuple[str, str | None, str | None], str] = {}
        self.device = local_device()
        self.world = join_world(self.device)
        self.config = config = settle_dtype(config, self.device)
        self.folder = RunFolder(config.run_dir)

    # --- examples ---

    @cached_property
    def _examples(self) -> tuple[list[Example], list[Example]]:
        data = self.config.data
        check_sources(data)
        with activity("reading the examples"):
            examples = load_examples(data.train, split=data.split, limit=data.limit)
            if data.heldout is not None:
                heldout = load_examples(data.heldout, split=data.heldout_split or data.split)
        if data.heldout is None:
            examples, heldout = split_heldout(examples, data.heldout_fraction)
        shared = overlap(examples, heldout)
        for line in shared.lines():
            say(line)
        shared.check(train=data.train, heldout=data.heldout or "its part", allowed=data.allow_overlap)
        return examples, heldout

    @cached_property
    def train(self) -> dict[str, TokenizedExample]:
        """The training examples by id, for the model that is trained."""
        return self._tokenized(self._examples[0], self.tokenizer)

    @cached_property
    def heldout_examples(self) -> list[Example]:
        """The held-out conversations, at most ``evaluate.limit``."""
        return self._examples[1][: self.config.evaluate.limit]

    @cached_property
    def heldout(self) -> list[TokenizedExample]:
        """The held-out examples, tokenised."""
        return list(self._tokenized(self.heldout_examples, self.tokenizer).values())

    @cached_property
    def train_id(self) -> str:
        """A hash of the training examples' tokens, masks and weights."""
        return examples_digest(self.train)

    @cached_property
    def reference_id(self) -> str:
        """The same of the training examples in the reference model's tokens."""
        examples = self.reference_examples
        return self.train_id if examples is self.train else examples_digest(examples)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end the training examples' answers, the most frequent first."""
        added = {*self.tokenizer.all_special_ids, *getattr(self.tokenizer, "added_tokens_decoder", {})}
        return stop_ids(self.train.values(), max_length=self._max_length, among=added)

    @property
    def _max_length(self) -> int:
        return self.config.data.max_length or 2048

    def _tokenized(self, examples: list[Example], tokenizer: Any) -> dict[str, TokenizedExample]:
        with activity(f"tokenising {len(examples)} examples"):
            tokenized = tokenize_examples(examples, tokenizer, max_length=self._max_length)
        return {example.id: example for example in tokenized}

    # --- models ---

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the model that is trained, with the configured chat template."""
        return self._load_tokenizer(self.model_source)

    def _load_tokenizer(self, source: ModelConfig) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(source.name, revision=source.revision or "main")
        if self.config.data.chat_template is not None:
            use_chat_template(tokenizer, self.config.data.chat_template)
        return tokenizer

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
    def reference_examples(self) -> dict[str, TokenizedExample]:
        """The training examples in the reference model's tokens."""
        if self.reference_source == self.model_source:
            return self.train
        return self._tokenized(self._examples[0], self._load_tokenizer(self.reference_source))

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
