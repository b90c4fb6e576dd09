"""The knobs by section: one dataclass each, with defaults, help and range. ``config.py`` makes one ``Config`` of them.

Defaults are those of the SFTMix paper (arXiv 2410.05248) wherever it states one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sftmix.knobs import knob

_UNITS = {
    "s": 1.0,
    "sec": 1.0,
    "second": 1.0,
    "m": 60.0,
    "min": 60.0,
    "minute": 60.0,
    "h": 3600.0,
    "hour": 3600.0,
}
TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True)
class Interval:
    """A time in seconds or a number of optimizer steps; the other is None."""

    seconds: float | None = None
    steps: int | None = None


def interval(name: str, text: str) -> Interval:
    """``10 min``, ``90 s``, ``2 h`` or ``500 steps``. Raises ``ValueError`` naming the knob for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text.lower())
    unit = found[2].rstrip("s") or found[2] if found else ""
    if found and float(found[1]) > 0:
        if unit in _UNITS:
            return Interval(seconds=float(found[1]) * _UNITS[unit])
        if unit == "step" and float(found[1]).is_integer():
            return Interval(steps=int(float(found[1])))
    raise ValueError(
        f"{name}: expected a time or a number of steps, such as 10 min or 500 steps, got {text!r}"
    )


@dataclass(frozen=True)
class ModelConfig:
    """The language model that is trained."""

    name: str = knob("model to train: a local folder or a hub id")
    gguf_file: str | None = knob("file name of a GGUF checkpoint inside the model's folder", None)
    dtype: str = knob(
        "data type of the model's parameters; auto: bfloat16 where the device multiplies it, else float32",
        "auto",
        choices=("auto", "float32", "bfloat16"),
    )
    attn_implementation: str | None = knob("attention implementation passed to transformers", None)
    revision: str | None = knob("revision of a hub model", None)
    trust_remote_code: bool = knob(
        "run Python code that the model's folder or repository brings along", False
    )
    added_tokens: str | None = knob(
        "tokens to add to the vocabulary, with commas; embedding and head get rows for them", None
    )


@dataclass(frozen=True)
class DataConfig:
    """Where the examples come from, and how they become tokens."""

    train: str = knob(
        "training examples: a file, folder, glob, several of them with commas, or a datasets id"
    )
    split: str = knob("split to read when train is a datasets id or a saved DatasetDict", "train")
    configuration: str | None = knob("configuration to read when train is a datasets id", None)
    heldout: str | None = knob("held-out examples, same forms; null: a part of the training examples", None)
    heldout_split: str | None = knob("split of heldout; must be given where heldout is a datasets id", None)
    heldout_configuration: str | None = knob("configuration of heldout when it is a datasets id", None)
    heldout_fraction: float = knob(
        "share of the training examples held out (by a hash of the id) when heldout is null; 0: none",
        0.05,
        at_least=0,
        below=1,
    )
    allow_overlap: bool = knob("go on although held-out examples are among the training examples", False)
    limit: int | None = knob("use only the first so many examples", None, at_least=1)
    streaming: bool = knob("read a datasets id as a stream, so that limit saves the download", False)
    form: str | None = knob(
        "form of the rows where their columns allow several; `sftmix data --forms` lists them", None
    )
    columns: str | None = knob("other names of columns, e.g. question=query,answer=reply", None)
    supervise: str = knob(
        "turns that bear loss; all: every answer, of a prompt-completion row the completion",
        "all",
        choices=("all", "last", "completion", "marked"),
    )
    bad_rows: str = knob(
        "rows that cannot be used: refuse them all, or drop them, counted",
        "refuse",
        choices=("refuse", "drop"),
    )
    max_length: int | None = knob(
        "longest sequence, in tokens; null: the model's positions, at most 2048", None, at_least=2
    )
    too_long: str = knob(
        "longer examples: drop, cut (the answer loses its end), cut_prompt (on its left), or refuse",
        "cut",
        choices=("drop", "cut", "cut_prompt", "refuse"),
    )
    chat_template: str | None = knob("path of a Jinja chat template that overrides the tokenizer's", None)
    template_arguments: str | None = knob("arguments of the chat template, a JSON object", None)
    template_drops: str = knob(
        "text that the chat template leaves out (say, earlier reasoning): refuse the row, or use it",
        "refuse",
        choices=("refuse", "allow"),
    )
    date: str | None = knob(
        "date that a chat template prints, YYYY-MM-DD; null: the day the run was begun", None
    )
    end_token: str | None = knob("token put after answers that the chat template leaves without an end", None)
    special_tokens: str = knob(
        "a special token's string in the examples' text: text keeps it text, token lets it become the token",
        "text",
        choices=("text", "token"),
    )
    num_workers: int | None = knob(
        "processes that tokenise; null: one per core where it pays", None, at_least=1
    )


@dataclass(frozen=True)
class ReferenceConfig:
    """The next-token run whose checkpoints score every example."""

    model: str | None = knob("reference model, e.g. a smaller one; null: model.name", None)
    epochs: int = knob("epochs of the reference run", 3, at_least=1)
    checkpoints_per_epoch: int = knob("scoring points per epoch, evenly spaced", 1, at_least=1)
    dynamics: str = knob(
        "score saved checkpoints (the paper), the training steps themselves, or both",
        "checkpoint",
        choices=("checkpoint", "online", "both"),
    )
    scores: str | None = knob("a ready dynamics.parquet, used in place of the reference run", None)


@dataclass(frozen=True)
class SplitConfig:
    """How the examples are cut into a confident and an unconfident half, and which of them are trained on."""

    by: str = knob(
        "cut at the median confidence (the paper), at a quantile, at random, or as split.file says",
        "median",
        choices=("median", "quantile", "random", "given"),
    )
    confident_share: float = knob(
        "with quantile: share of the examples, the most confident ones, in that half", 0.5, above=0, below=1
    )
    file: str | None = knob(
        "with given: Parquet, JSONL or CSV of example (id, guid) and half, or confidence to cut at its median",
        None,
    )
    use: str = knob(
        "train on both halves, or as a control on one of them alone, which is then paired within itself",
        "both",
        choices=("both", "confident", "unconfident"),
    )


@dataclass(frozen=True)
class MixupConfig:
    """The Mixup term: a regulariser, with weight 1 a second loss, with ntp_weight 0 the only one."""

    alpha: float = knob("lambda is drawn from Beta(alpha, alpha)", 0.5, above=0)
    weight: float = knob("weight mu of the Mixup term; 0 is plain next-token prediction", 0.2, at_least=0)
    ntp_weight: float = knob(
        "weight of the next-token term beside it; 0: Mixup alone, tokens without a partner train nothing",
        1.0,
        at_least=0,
    )
    schedule: str = knob(
        "the weight mu over the run, after its warm-up",
        "constant",
        choices=("constant", "linear", "cosine"),
    )
    warmup_ratio: float = knob(
        "share of all steps over which mu rises from 0 to its weight", 0.0, at_least=0, below=1
    )
    lam: str = knob(
        "one lambda per pair, per mixed token, or per optimizer step",
        "pair",
        choices=("pair", "token", "batch"),
    )
    pairing: str = knob(
        "partners at random, or of similar length among 64 at random: less is cut by the shorter one",
        "random",
        choices=("random", "length"),
    )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = knob("peak learning rate", 2e-6, above=0)
    weight_decay: float = knob("decoupled weight decay", 0.1, at_least=0)
    beta1: float = knob("AdamW beta1", 0.9, at_least=0, below=1)
    beta2: float = knob("AdamW beta2", 0.999, at_least=0, below=1)
    eps: float = knob("AdamW epsilon", 1e-8, above=0)
    warmup_ratio: float = knob("share of all steps spent warming up", 0.1, at_least=0, below=1)
    schedule: str = knob("decay after the warm-up", "cosine", choices=("cosine", "linear", "constant"))
    max_grad_norm: float = knob("gradients are clipped to this global norm", 1.0, above=0)


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    method: str = knob("SFTMix or plain next-token prediction", "sftmix", choices=("sftmix", "ntp"))
    epochs: int = knob("passes over the training examples", 3, at_least=1)
    batch_size: int = knob("sequences per optimizer step over all processes", 32, at_least=2, even=True)
    micro_batch_size: int = knob("sequences per forward pass and process", 8, at_least=2, even=True)
    packing: str = knob(
        "several sequences in a row, unpadded; auto: where it is cheap", "auto", choices=("auto", "on", "off")
    )
    tuning: str = knob("train all parameters or LoRA adapters", "full", choices=("full", "lora"))
    max_steps: int | None = knob("stop after so many optimizer steps", None, at_least=1)
    log_every: int = knob("optimizer steps between metric records", 1, at_least=1)
    gradient_checkpointing: str = knob(
        "recompute activations in the backward pass: none, full, or selective (all but products, attention)",
        "none",
        choices=("none", "selective", "full"),
        aliases={False: "none", True: "full"},
    )
    compile: bool = knob("compile each decoder block with torch.compile", False)
    replicas: int = knob(
        "copies of the sharded model (HSDP), e.g. one per node; 1: sharded over all processes", 1, at_least=1
    )
    head_sharding: str = knob(
        "with several processes, gather the untied head's weight or exchange hidden states; auto: fewer bytes",
        "gather",
        choices=("gather", "exchange", "auto"),
    )
    checkpoint_every: str = knob(
        "time or optimizer steps between checkpoints, e.g. 10 min, 2 h, 500 steps; also one after every epoch",
        "10 min",
    )
    keep_checkpoints: int = knob("newest checkpoints that are kept", 2, at_least=1)
    async_checkpoint: bool = knob(
        "write checkpoints beside the training, from a copy in the host's memory", False
    )
    max_bad_steps: int = knob(
        "steps in a row that are skipped where loss or gradient is not finite; one more ends the run",
        3,
        at_least=0,
    )
    report_to: str | None = knob(
        "also send the metrics to tensorboard, wandb or trackio, with commas; null: metrics.jsonl alone", None
    )
    impl: str | None = knob(
        "loss implementation; null: by device", None, choices=("reference", "chunked", "fused")
    )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters, used when ``train.tuning`` is ``lora``."""

    rank: int = knob("rank of each adapter", 16, at_least=1)
    alpha: int = knob("adapters are scaled by alpha / rank", 32, at_least=1)
    dropout: float = knob("dropout before each adapter", 0.0, at_least=0, below=1)
    rslora: bool = knob("scale adapters by alpha / sqrt(rank) (rsLoRA)", False)
    dora: bool = knob("weight-decomposed adapters (DoRA)", False)
    target_modules: str = knob(
        "all-linear (the head excepted), names of modules or of fused experts' weights, with commas",
        "all-linear",
    )
    modules_to_save: str | None = knob(
        "modules trained whole beside the adapters, e.g. embed_tokens,lm_head", None
    )
    layers: str | None = knob("adapt only layers start:stop, e.g. 20:30; null: all", None)


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out evaluation."""

    batch_size: int = knob("sequences per forward pass", 8, at_least=1)
    num_samples: int = knob("sample answers to print", 3, at_least=0)
    max_new_tokens: int = knob("longest sample answer, in tokens", 64, at_least=1)
    limit: int | None = knob("evaluate only the first so many held-out examples", None, at_least=1)
    tasks: str | None = knob(
        "benchmarks, with commas: gsm8k=FILE, pubmedqa=FILE, medqa=FILE, a task's YAML file, a folder of them",
        None,
    )
    num_fewshot: int | None = knob(
        "examples before each row of a benchmark; null: as its file says, 0 for the built-in ones",
        None,
        at_least=0,
    )
    fewshot: str | None = knob(
        "files of the built-in benchmarks' examples, e.g. gsm8k=FILE; null: their other rows", None
    )
    task_limit: int | None = knob(
        "use only the first so many rows of each benchmark and file of questions", None, at_least=1
    )
    task_template: str = knob(
        "ask benchmarks by the chat template; auto: where the tokenizer has one",
        "auto",
        choices=("auto", "on", "off"),
        aliases={True: "on", False: "off"},
    )
    unsafe_code: bool = knob("run benchmarks that execute what the model writes", False)
    answers: str | None = knob(
        "files of questions to answer, with commas: mt-bench=FILE, alpaca-eval=FILE", None
    )
    answer_tokens: int = knob(
        "longest answer to a question, and of the built-in benchmarks, in tokens", 1024, at_least=1
    )
