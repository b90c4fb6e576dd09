"""``SFTMixTrainer``: TRL's ``SFTTrainer``, whose loss is SFTMix and whose batches are pairs.

What the user's script passes goes to ``SFTTrainer``, which loads, templates, tokenises, masks and wraps as ever. Ours
are: the order of the training examples (pairs of the two halves, new ones every epoch), the head (``LossHead``, in the
place of TRL's fused one), the loss over all tokens of an optimizer step (both denominators, over accumulation and
processes), and scores of every example from the same forward. Evaluation is the next-token loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl import SFTTrainer

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
from sftmix.transformers.callback import epoch_of, is_whole_epoch
from sftmix.transformers.pairs import PairCollator, PairDataset, PairSampler, examples_of, rows_of
from sftmix.trl.checks import check_ids, check_made, check_options, only_trained, without_trls_head
from sftmix.trl.config import SFTMixConfig
from sftmix.trl.reference import online_dynamics

DYNAMICS_FILE = "dynamics.parquet"
PARTS = 8  # sums of a batch that are logged, see ``_tell``
_OWN = ("rows", "target", "lam", "example", "ids", "starts", "labels")  # of a batch, not for the model


class SFTMixTrainer(SFTTrainer):  # type: ignore[misc]
    """``SFTTrainer`` with the SFTMix loss (Xiao et al., 2026): takes all that it takes, ``args`` an ``SFTMixConfig``.

    ``dynamics``: the scores of every training example, ``Dynamics``, their file, or rows as ``dynamics.parquet`` has
    them, by the ids of ``args.id_column``; ``split``: the two halves, in their place. With neither, ``args.dynamics``
    is read, or ``args.reference="online"`` trains next-token first. After ``train`` the scores taken on the way are in
    ``dynamics_rows`` and in ``dynamics.parquet`` of the output folder.

    Raises ``ValueError`` naming the argument for what it cannot be beside: an iterable dataset, images, Liger's head,
    label smoothing, a loss of one's own, DeepSpeed.
    """

    _tag_names = ["trl", "sftmix"]  # noqa: RUF012  # TRL's own name and type
    args: SFTMixConfig
    data_collator: Any

    def __init__(
        self, model: Any, args: SFTMixConfig | None = None, *positional: Any,
        dynamics: Dynamics | str | Path | None = None, split: Split | None = None, **options: Any,
    ) -> None:  # fmt: skip
        if args is None:
            args = SFTMixConfig("sftmix-output")
        if not isinstance(args, SFTMixConfig):
            raise ValueError(f"args: expected an SFTMixConfig, got {type(args).__name__}")
        check_options(args, options)
        with without_trls_head():
            super().__init__(model, args, *positional, **options)
        check_made(self)
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        found = base.__dict__.get("_sftmix")  # of an earlier trainer of this model; not among its modules
        self.sftmix: SFTMixModel = found if found is not None else install_head(base)
        if found is None:
            verify_head(self.sftmix)
            base.__dict__["_sftmix"] = self.sftmix
        self.examples = examples_of(self.train_dataset, args.id_column)
        self.split = self._halves(dynamics, split)
        self.packed = bool(args.padding_free) and packs(self.sftmix, "on")
        self.online = OnlineDynamics(self.examples, enabled=True)
        self._counts = (0, 0)  # tokens and mixed tokens of the optimizer step under way, over all processes
        self._window = {mode: [0.0] * PARTS for mode in ("train", "eval")}  # sums since the newest log
        self.add_callback(_Epochs(self))
        # The loss is over the step's tokens already; no division by the accumulation.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    @classmethod
    def from_dynamics(cls, dynamics: Dynamics | str | Path, *arguments: Any, **options: Any) -> SFTMixTrainer:
        """A trainer whose halves come from scores: ``Dynamics`` or the path of a ``dynamics.parquet``."""
        return cls(*arguments, dynamics=dynamics, **options)

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
        pairs = PairDataset(
            self.examples, self.split, seed=self._seed, alpha=args.mixup_alpha, pairing=args.mixup_pairing
        )
        collator = PairCollator(
            args.mixup, seed=self._seed, pad_id=self._pad_id(), vocab_size=self.sftmix.vocab_size, packed=self.packed,
            step_size=size,
        )  # fmt: skip
        before: Any = self.data_collator, args.remove_unused_columns
        self.data_collator, args.remove_unused_columns = collator, False
        try:
            return self._get_dataloader(
                dataset=pairs, description="Training", batch_size=self._train_batch_size,
                sampler_fn=lambda dataset: PairSampler(len(dataset)), is_training=True,
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
        if training and self.args.mixup_ntp_weight != 1:
            options["row_weight"] = torch.full(
                (rows.numel(),), self.args.mixup_ntp_weight, device=rows.device
            )
        given = {key: value for key, value in inputs.items() if key not in _OWN}
        starts = inputs.get("starts")
        if starts is not None:
            given |= packed_inputs(self.sftmix.base, inputs["position_ids"], starts)
        if self.aux_loss_enabled:
            given["output_router_logits"] = True
        call = HeadCall(rows, target, options, entropy=self._tells_entropy(training), attached=True)
        with call.at(self.sftmix.head), documents(starts):
            outputs = model(**given, use_cache=False)
        loss = call.result
        if training:
            self.online.add(loss.nll, loss.is_top1, inputs["example"], inputs["ids"])
        total = loss.loss
        self._tell(call, loss, inputs, "train" if training else "eval")
        if self.aux_loss_enabled:
            steps = self.current_gradient_accumulation_steps if training else 1
            total = total + self.router_aux_loss_coef * outputs.aux_loss / steps
            aux = self.accelerator.gather(outputs.aux_loss.detach()).mean().item()
            self._metrics["train" if training else "eval"]["aux_loss"].append(aux)
        if training or num_items_in_batch is not None:
            # Over all processes' tokens; DDP and FSDP average the gradients over the processes.
            total = total * (self.accelerator.num_processes // self.get_tp_size())
        if not return_outputs:
            return total
        with torch.no_grad():
            return total, model(**given, use_cache=False)

    def _mixup_now(self) -> float:
        """mu in the step that comes next."""
        mixup = self.args.mixup
        return scheduled(
            mixup.weight, mixup.schedule, mixup.warmup_ratio, self.state.global_step, self.state.max_steps
        )

    def _tells_entropy(self, training: bool) -> bool:
        """Whether this step's entropy will be logged: it costs a product with the head, so others leave it out."""
        if not training:
            return True
        every = self.state.logging_steps or self.args.logging_steps
        return (self.state.global_step + 1) % max(1, int(every)) == 0

    def _tell(self, call: HeadCall, loss: Any, inputs: Mapping[str, Any], mode: str) -> None:
        """TRL's metrics of a batch, and the loss's parts."""
        zero = loss.nll.new_zeros(())
        entropy, told = (zero, 0) if call.entropy is None else (call.entropy.sum(), loss.nll.numel())
        parts = [
            loss.nll.sum(), loss.mixup_nll.sum(), loss.is_top1.sum(), zero + loss.nll.numel(),
            zero + loss.mixup_nll.numel(), entropy,
            zero + told, self._tokens_read(inputs, zero) if mode == "train" else zero,
        ]  # fmt: skip
        here = torch.stack([part.detach().double() for part in parts])
        sums = self.accelerator.gather(here[None]).sum(0).tolist()
        self._window[mode] = [a + b for a, b in zip(self._window[mode], sums, strict=True)]
        self._total_train_tokens += int(sums[-1]) // self._tp_size

    def _tokens_read(self, inputs: Mapping[str, Any], zero: Tensor) -> Tensor:
        mask = inputs.get("attention_mask")
        return zero + (inputs["input_ids"].numel() if mask is None else mask.sum())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's metrics, each over all tokens since the newest log, and the parts of SFTMix's loss."""
        mode = "train" if self.model.training else "eval"
        nll, mixup, top1, tokens, mixed, entropy, told, _ = self._window[mode]
        self._window[mode] = [0.0] * PARTS
        metrics = self._metrics[mode]
        metrics["num_tokens"] = [self._total_train_tokens]
        if tokens:
            metrics["mean_token_accuracy"] = [top1 / tokens]
            if told:
                metrics["entropy"] = [entropy / told]
            if mode == "train":
                metrics["ntp_loss"] = [nll / tokens]
                metrics["mixed_share"] = [2 * mixed / tokens]
                if mixed:
                    metrics["mixup_loss"] = [mixup / mixed]
        super().log(logs, start_time)

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

    def close_epoch(self) -> None:
        """Turn the sums of the epoch that is over into scores, over all processes; nothing where that is done.

        An epoch that left examples out (``max_steps``, ``dataloader_drop_last``) has no scores, with a word; of an
        example that was met twice, to give all processes as many batches, the first time counts.
        """
        epoch = epoch_of(self.state)
        self.online.close_epoch(epoch, self.state.global_step, join_world(self.args.device))
        met: dict[str, dict[str, Any]] = {}
        for row in self.online.rows:
            if row["checkpoint"] == epoch:
                met.setdefault(row["example"], row)
        others = [row for row in self.online.rows if row["checkpoint"] != epoch]
        if met and len(met) < len(self.examples):
            say(
                f"dynamics: {len(met)} of {len(self.examples)} examples were met in epoch {epoch}: it has no scores"
            )
            met = {}
        self.online.rows = others + list(met.values())

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if is_whole_epoch(self.state):  # a save at the epoch's last step comes before the epoch's end is told
            self.close_epoch()
        rows = self.online.so_far(epoch_of(self.state), join_world(self.args.device))
        if self.args.should_save and rows:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            write_table(folder / DYNAMICS_FILE, to_table(rows, SCHEMA, "dynamics"))

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


class _Epochs(TrainerCallback):  # type: ignore[misc]
    """Closes the scores of every epoch."""

    def __init__(self, trainer: SFTMixTrainer) -> None:
        self.trainer = trainer

    def on_epoch_end(self, *arguments: Any, **options: Any) -> None:
        self.trainer.close_epoch()
