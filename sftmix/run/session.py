"""What the stages of one run share: its configuration, examples, tokenizer and models, each made when first asked."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed as dist
from filelock import FileLock, Timeout
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
from sftmix.model.dtype import settle_dtype
from sftmix.model.parallel import join_world, local_device
from sftmix.model.quantised import check_quantised
from sftmix.model.tokenizer import rows
from sftmix.model.vocabulary import check_ids, safe_pad_id
from sftmix.progress import activity, say
from sftmix.rank import is_main
from sftmix.run.checksums import damage, described, sums
from sftmix.run.folder import RunFolder, Settings, stages_from
from sftmix.run.inputs import (
    heldout_source,
    kept,
    prepared,
    settle_date,
    token_options,
    tokenizer_for,
    train_source,
)
from sftmix.run.models import Models

logging.getLogger("transformers.modeling_gguf_pytorch_utils").setLevel(logging.ERROR)
disable_progress_bar()  # transformers' bars for reading and writing files; the stages have their own

PROOF_TEXTS = 4  # held-out texts on which an export's logits are compared with the trained model's


class Session:
    """One run folder being worked on; under torchrun, by every process together."""

    def __init__(self, config: Config, *, restart: str | None = None) -> None:
        self._made: set[Path] = (
            set()
        )  # files of tokenised examples that this session wrote, and all that it reads
        self._used: set[Path] = set()
        self._whole: set[str] = set()  # stages whose files are what they left
        self.device = local_device()
        self.world = join_world(self.device)
        self.config = config = settle_date(settle_dtype(config, self.device))
        self.folder = RunFolder(config.run_dir)
        check_quantised(config.model, config.train.tuning)
        self.models = Models(config, self.folder, self.device, self.world, fresh_base=restart == "all")

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
        held = rows(model)
        if held is not None:
            check_ids(tokenizer, held, store.ids_from(held))
        return store

    def take_back(self) -> None:
        """Remove the tokenised examples that this session made: a start that is refused leaves the folder as it was."""
        for path in self._made:
            remove(path)
        self._made.clear()

    @cached_property
    def _train_store(self) -> TokenStore:
        return self._prepared(train_source(self.config), self.tokenizer, self.models.source)

    def kept_tokens(self) -> tuple[TokenStore, Any] | None:
        """The training examples' tokens and their tokenizer if they are in the folder already; nothing is made.

        No model is read, and no other process waited for. Raises ``ValueError`` for data or tokenizer that are gone.
        """
        if "_train_store" in self.__dict__:
            return self._train_store, self.tokenizer
        model = self.models.kept_source
        if model is None:
            return None
        tokenizer, options = tokenizer_for(self.config, model), token_options(self.config, model)
        store = kept(train_source(self.config), tokenizer, options, self.folder.tokens)
        return None if store is None else (store, tokenizer)

    @cached_property
    def _reference_store(self) -> TokenStore:
        """The training examples in the reference model's tokens."""
        if self.models.reference == self.models.source:
            return self._train_store
        tokenizer = tokenizer_for(self.config, self.models.reference)
        return self._prepared(train_source(self.config), tokenizer, self.models.reference)

    @cached_property
    def _heldout_store(self) -> TokenStore | None:
        """The held-out examples of their own source; None where they are a part of the training examples."""
        source = heldout_source(self.config)
        if source is None:
            return None
        check_sources(self.config.data)
        return self._prepared(source, self.tokenizer, self.models.source)

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
        return token_options(self.config, self.models.source)

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
        return tokenizer_for(self.config, self.models.source)

    @cached_property
    def pad_id(self) -> int:
        """Any token that the model has a row for: padding is masked and bears no loss."""
        return safe_pad_id(self.tokenizer, rows(self.models.source) or sys.maxsize)

    @cached_property
    def reference_examples(self) -> Mapping[str, TokenizedExample]:
        """The training examples in the reference model's tokens."""
        return Chosen(self._reference_store, self._names[0])

    def proof_texts(self) -> list[tuple[int, ...]]:
        """A few held-out examples' tokens (training ones where there are none), on which an export is compared."""
        examples = self.heldout or list(self.train.values())
        return [example.input_ids for example in examples[:PROOF_TEXTS]]

    def with_method(self, method: str) -> Config:
        """The configuration with another ``train.method``."""
        return dataclasses.replace(self.config, train=dataclasses.replace(self.config.train, method=method))

    # --- processes and settings ---

    def hold(self) -> None:
        """Keep the run folder to this program until it ends; the lock of one that was killed is nobody's.

        Raises ``ValueError`` where another program works in it.
        """
        told = [""]
        if is_main():
            self.folder.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.folder.path / ".lock", is_singleton=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                told = [
                    "expected a run folder that no other program works in, got one in use; wait, or take another"
                ]
            except (OSError, NotImplementedError) as error:  # some network file systems have no locks
                say(f"warning: {self.folder.path} cannot be locked ({error}): keep other programs out of it")
        if dist.is_initialized():
            dist.broadcast_object_list(told, src=0)
        if told[0]:
            self.take_back()
            raise ValueError(f"{self.folder.path}: {told[0]}")

    def barrier(self) -> None:
        """Wait for the other processes, if there are any."""
        if dist.is_initialized():
            dist.barrier()

    def finish(self, stage: str, settings: Settings, about: Settings) -> None:
        """Record a finished stage and the sums of its files, once all processes are done with it."""
        self.barrier()
        if is_main():
            self.folder.note(stage, "finished", settings, about, sums(self.folder.path, stage))
        self.barrier()
        self._whole.add(stage)

    def damage(self, stage: str) -> dict[str, str]:
        """What is wrong with the files that a finished ``stage`` left, by path; the same on every process.

        Files that this session has found whole, or written, are not read again: a model has many bytes.
        """
        if stage in self._whole:
            return {}
        told: list[dict[str, str]] = [{}]
        if is_main():
            files = self.folder.record().get(stage, {}).get("files")
            told = [damage(self.folder.path, files if isinstance(files, dict) else {})]
        if dist.is_initialized():
            dist.broadcast_object_list(told, src=0)
        if not told[0]:
            self._whole.add(stage)
        return told[0]

    def require_whole(self, stage: str, command: str) -> None:
        """Raise ``ValueError`` where a file that ``stage`` left is gone or damaged; ``command`` makes it anew."""
        found = self.damage(stage)
        if found:
            raise ValueError(
                f"{self.folder.path}: {described(found)}; run `sftmix {command}` to make it anew"
            )

    def forget_exports(self, stage: str) -> None:
        """Take away what a training run exported: it is about to train on."""
        self.barrier()
        if is_main() and stage.startswith("train-"):
            for path in self.folder.exports(stage.removeprefix("train-"), "both"):
                shutil.rmtree(path, ignore_errors=True)
        self.barrier()

    def discard(self, stage: str, damaged: Mapping[str, str]) -> None:
        """Take away what ``stage`` has to make again."""
        self.barrier()
        if is_main():
            self.folder.discard(stage, damaged)
        self.barrier()

    def restart(self, stage: str) -> None:
        """Remove the files and records of ``stage`` and of all stages after it, saying which."""
        self.barrier()
        if is_main():
            removed = self.folder.remove(stages_from(stage))
            say(f"restart {stage}: removed {', '.join(removed) or 'nothing, nothing was there'}")
        self.barrier()
