"""SFTMix inside any ``Trainer`` of transformers: ``PairTraining``, the part that TRL's and axolotl's trainers share.

Ours are: the order of the training examples (pairs of the two halves, new ones every epoch), the head (``LossHead``),
the loss over all tokens of an optimizer step (both denominators, over accumulation and processes), and scores of every
example from the same forward. Evaluation is the next-token loss. All else is the trainer's behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from sftmix.model.causal_lm import HeadCall, SFTMixModel, install_head, verify_head
from sftmix.model.documents import documents
from sftmix.model.packing import packed_inputs, packs
from sftmix.model.parallel import join_world
from sftmix.progress import say
from sftmix.scores.confidence import make_split
from sftmix.scores.dynamics import (
    SCHEMA,
    Dynamics,
    read_dynamics,
    read_rows,
    to_table,
    write_dynamics,
    write_table,
)
from sftmix.scores.halves import Split
from sftmix.scores.online import OnlineDynamics
from sftmix.training.optim import scheduled
from sftmix.transformers.arguments import mixup_of
from sftmix.transformers.callback import epoch_of, is_whole_epoch
from sftmix.transformers.checks import check_ids, check_unpatched, only_trained, only_whole
from sftmix.transformers.epochs import Epochs
from sftmix.transformers.pairs import PairCollator, PairDataset, PairSampler, examples_of, rows_of
from sftmix.transformers.reference import online_dynamics
from sftmix.transformers.window import Window

DYNAMICS_FILE = "dynamics.parquet"
_OWN = ("rows", "target", "lam", "example", "ids", "starts", "labels")  # of a batch, not for the model


class PairTraining(Trainer):  # type: ignore[misc]
    """A base class that stands before a trainer's own: ``class Mine(PairTraining, SomeTrainer)``.

    ``args`` has the fields of ``PairArguments``; ``prepare_pairs`` is called once the trainer was made.
    """

    args: Any
    model: Any
    train_dataset: Any
    data_collator: Any
    _total_train_tokens = 0

    def prepare_pairs(self, dynamics: Dynamics | str | Path | None, split: Split | None) -> None:
        """Put our head into the model, and find the examples and their halves."""
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        check_unpatched(base)
        found = base.__dict__.get("_sftmix")  # of an earlier trainer of this model; not among its modules
        self.sftmix: SFTMixModel = found if found is not None else install_head(base)
        if found is None:
            verify_head(self.sftmix)
            base.__dict__["_sftmix"] = self.sftmix
        self.examples = examples_of(self.train_dataset, self.args.id_column)
        self.split = self._halves(dynamics, split)
        self.packed = bool(getattr(self.args, "padding_free", False)) and packs(self.sftmix, "on")
        self.online = OnlineDynamics(self.examples, enabled=True)
        self.sampler = PairSampler(len(self.examples))
        self._counts = (0, 0)  # tokens and mixed tokens of the optimizer step under way, over all processes
        self._window = Window()
        self.add_callback(Epochs(self))
        # The loss is over the step's tokens already; no division by the accumulation.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def next_token_run(self, args: Any) -> PairTraining:
        """A trainer of this kind for the reference run: the same model and data, other arguments."""
        made = {
            name: value
            for name in ("processing_class", "optimizer_cls_and_kwargs")
            if (value := getattr(self, name, None)) is not None
        }
        return type(self)(self.model, args, train_dataset=self.train_dataset, **made)

    def _halves(self, dynamics: Dynamics | str | Path | None, split: Split | None) -> Split | None:
        if split is not None and dynamics is not None:
            raise ValueError("split: expected None beside dynamics, got both")
        if dynamics is None and split is None and self.args.dynamics is not None:
            dynamics = self.args.dynamics
        if dynamics is not None:
            scores = dynamics if isinstance(dynamics, Dynamics) else read_dynamics(dynamics)
            check_ids("dynamics", scores.examples, self.examples)
            return make_split(only_trained(scores, self.examples))
        if split is not None:
            check_ids("split", [*split.confident, *split.unconfident], self.examples)
        elif self.args.reference is None:
            raise ValueError(
                "dynamics: expected scores of the training examples (dynamics=, split=, args.dynamics) or "
                "args.reference='online', which takes them in a run of its own first, got neither"
            )
        return split

    # Data

    @property
    def _seed(self) -> int:
        return int(self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The pairs of each epoch; Trainer's own options for workers, memory and processes hold."""
        args = self.args
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        mixup = mixup_of(args)
        pairs = PairDataset(
            self.examples, self.split, seed=self._seed, alpha=mixup.alpha, pairing=mixup.pairing
        )
        collator = PairCollator(
            mixup, seed=self._seed, pad_id=self._pad_id(), vocab_size=self.sftmix.vocab_size, packed=self.packed,
            step_size=size,
        )  # fmt: skip
        group = args.per_device_train_batch_size * args.world_size
        if args.world_size > 1 and len(pairs) % group and not args.dataloader_drop_last:
            say(
                f"train_dataset: every epoch ends with {-len(pairs) % group} examples a second time, so that "
                f"{args.world_size} processes have as many"
            )
        before: Any = self.data_collator, args.remove_unused_columns
        self.data_collator, args.remove_unused_columns = collator, False
        try:
            return self._get_dataloader(
                dataset=pairs, description="Training", batch_size=self._train_batch_size,
                sampler_fn=lambda _: self.sampler, is_training=True,
            )  # fmt: skip
        finally:
            self.data_collator, args.remove_unused_columns = before

    def _pad_id(self) -> int:
        found = getattr(self.processing_class, "pad_token_id", None)
        return int(found) if found is not None and 0 <= found < self.sftmix.vocab_size else 0

    def get_batch_samples(self, *arguments: Any) -> tuple[list[Any], Any]:
        """The step's batches, and both its counts over accumulation and processes."""
        batches, _ = super().get_batch_samples(*arguments)
        if batches and "rows" in batches[0]:
            counts = [sum(batch[name].numel() for batch in batches) for name in ("rows", "lam")]
            found = self.accelerator.gather(torch.tensor([counts], device=self.args.device)).sum(0).tolist()
            self._counts = (int(found[0]), int(found[1]))
            return batches, torch.tensor(self._counts[0], device=self.args.device)
        return batches, _

    # Loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The SFTMix loss of a batch of pairs; the mean next-token loss of one that is evaluated."""
        training = "rows" in inputs
        labels = inputs["labels"]
        rows, target = (inputs["rows"], inputs["target"]) if training else rows_of(labels)
        lam = inputs["lam"] if training else torch.empty(0, device=rows.device)
        tokens, mixed = self._counts if training else (max(1, rows.numel()), 1)
        if not training and num_items_in_batch is not None:
            tokens = num_items_in_batch
        options: dict[str, Any] = {
            "lam": lam, "mixup_weight": self._mixup_now() if training else 0.0, "impl": self.args.sftmix_impl,
            "ntp_denominator": tokens, "mixup_denominator": max(1, mixed),
        }  # fmt: skip
        if self.sftmix.extra.z_loss:
            options["z_loss"] = self.sftmix.extra.z_loss
        if training and self.args.mixup_ntp_weight != 1:
            options["row_weight"] = torch.full((len(rows),), self.args.mixup_ntp_weight, device=rows.device)
        given = {key: value for key, value in inputs.items() if key not in _OWN}
        starts = inputs.get("starts")
        if starts is not None:
            given |= packed_inputs(self.sftmix.base, inputs["position_ids"], starts)
        given |= self.model_options()
        call = HeadCall(rows, target, options, entropy=self._tells_entropy(training), attached=True)
        with call.at(self.sftmix.head), documents(starts):
            outputs = model(**given, use_cache=False)
        loss = call.result
        if training:
            self.online.add(loss.nll, loss.is_top1, inputs["example"], inputs["ids"])
        total = loss.loss
        self._tell(call, loss, inputs, "train" if training else "eval")
        weight = self.aux_weight
        if weight:
            steps = self.current_gradient_accumulation_steps if training else 1
            total = total + weight * outputs.aux_loss / steps
            aux = self.accelerator.gather(outputs.aux_loss.detach()).mean().item()
            self.tell_aux_loss(aux, "train" if training else "eval")
        if training or num_items_in_batch is not None:
            # Over all processes' tokens; DDP and FSDP average the gradients over the processes.
            total = total * (self.accelerator.num_processes // self.get_tp_size())
        if not return_outputs:
            return total
        with torch.no_grad():
            return total, model(**given, use_cache=False)

    def _mixup_now(self) -> float:
        """mu in the step that comes next."""
        mixup, state = mixup_of(self.args), self.state
        return scheduled(mixup.weight, mixup.schedule, mixup.warmup_ratio, state.global_step, state.max_steps)

    def _tells_entropy(self, training: bool) -> bool:
        """Whether this step's entropy will be logged: it costs a product with the head, so others leave it out."""
        if not training:
            return True
        every = self.state.logging_steps or self.args.logging_steps
        return (self.state.global_step + 1) % max(1, int(every)) == 0

    def _tell(self, call: HeadCall, loss: Any, inputs: Mapping[str, Any], mode: str) -> None:
        """TRL's metrics of a batch, and the loss's parts."""
        zero, mask = loss.nll.new_zeros(()), inputs.get("attention_mask")
        read = inputs["input_ids"].numel() if mask is None else mask.sum()
        entropy, told = (zero, 0) if call.entropy is None else (call.entropy.sum(), loss.nll.numel())
        parts = [
            loss.nll.sum(), loss.mixup_nll.sum(), loss.is_top1.sum(), zero + loss.nll.numel(),
            zero + loss.mixup_nll.numel(), entropy,
            zero + told, zero + (read if mode == "train" else 0),
        ]  # fmt: skip
        here = torch.stack([part.detach().double() for part in parts])
        sums = self.accelerator.gather(here[None]).sum(0).tolist()
        self._window.add(mode, sums)
        self._total_train_tokens += int(sums[-1]) // self.get_tp_size()

    def window_metrics(self, mode: str) -> dict[str, float]:
        """TRL's metrics, each over all tokens since the newest log, and the parts of SFTMix's loss; a new window."""
        return {"num_tokens": self._total_train_tokens, **self._window.take(mode)}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """What is logged, and our metrics."""
        mode = "train" if self.model.training else "eval"
        metrics = self.window_metrics(mode)
        if mode == "eval":
            metrics = {f"eval_{key}": value for key, value in metrics.items()}
        super().log({**logs, **metrics}, start_time)

    @property
    def aux_weight(self) -> float:
        """The weight of the model's auxiliary loss; 0 where it has none."""
        return self.sftmix.extra.aux_weight

    def model_options(self) -> dict[str, Any]:
        """Options of the model's forward beside its inputs."""
        return {}

    def tell_aux_loss(self, value: float, mode: str) -> None:
        """Take the auxiliary loss of a batch, over all processes, for the log."""

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """As the trainer's own, but where only the loss is wanted no logits are made for it."""
        if not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    # Runs

    def train(self, *arguments: Any, **options: Any) -> Any:
        """As ``Trainer.train``; with ``reference="online"`` the reference run first, unless its scores are there."""
        if self.split is None:
            path = Path(self.args.output_dir) / "reference" / DYNAMICS_FILE
            scores = online_dynamics(self, path)
            check_ids("dynamics", scores.examples, self.examples)
            self.split = make_split(scores)
        result = super().train(*arguments, **options)
        if self.is_world_process_zero() and self.online.rows:
            write_dynamics(Path(self.args.output_dir) / DYNAMICS_FILE, self.online.rows)
        return result

    def train_plain(self) -> Any:
        """Train as the trainer behind this class does, without a reference run before and scores on disk after."""
        return super().train()

    def close_epoch(self) -> None:
        """Turn the sums of the epoch that is over into scores, over all processes; nothing where that is done.

        An epoch that left examples out (``max_steps``, ``dataloader_drop_last``) has no scores, with a word; of an
        example that was met twice, to give all processes as many batches, the first time counts.
        """
        epoch = epoch_of(self.state)
        self.online.close_epoch(epoch, self.state.global_step, join_world(self.args.device))
        self.online.rows = only_whole(self.online.rows, epoch, len(self.examples))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if is_whole_epoch(self.state):  # a save at the epoch's last step comes before the epoch's end is told
            self.close_epoch()
        rows = self.online.so_far(epoch_of(self.state), join_world(self.args.device))
        if self.args.should_save and rows:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            write_table(folder / DYNAMICS_FILE, to_table(rows, SCHEMA, "dynamics"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As ever, but peft, which widens the adapters that it reads to float32, leaves the types that trained."""
        kept = {name: p.dtype for name, p in self.model.named_parameters() if p.requires_grad}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, parameter in self.model.named_parameters():
            if name in kept and parameter.dtype != kept[name]:
                parameter.data = parameter.data.to(kept[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        path = None if checkpoint is None else Path(checkpoint) / DYNAMICS_FILE
        if path is not None and path.exists():
            done = epoch_of(self.state) + is_whole_epoch(self.state)
            self.online.restore(read_rows(path), done)

    @property
    def dynamics_rows(self) -> list[dict[str, Any]]:
        """The scores of the epochs that are over: rows of ``dynamics.parquet``, source ``online``."""
        return list(self.online.rows)
