"""Stand-ins for the tokenizers of real model families: their special tokens and ends, a tiny byte-level BPE inside.

A chat template is only as good as the tokenizer it meets: whether ``<|im_end|>`` is one token, which token generation
stops at, whether ``<think>`` is special. ``FAMILIES`` states that per family; the text in between is cut into bytes
with a few merges, so that tokens cross the borders of answers as real ones do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# What looks like a token in the source of a template: <|a|>, <a|>, <|a>, <a>, </a> and Gemma 4's quotation mark.
_MARKER = re.compile(r"<\|?/?[｜A-Za-z_▁0-9:\"]+(?:\|[A-Za-z_]+)*\|?>|<\|\"\|>")
# Markup that real tokenizers hold as tokens which are not special: skip_special_tokens keeps them.
_NOT_SPECIAL = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_MERGES = [("Ċ", "Ċ"), ("Ġ", "t"), ("Ġ", "a"), ("t", "h"), ("i", "n"), ("Ġt", "h"), ("e", "r"), ("o", "n")]


@dataclass(frozen=True)
class Family:
    """What a model family's tokenizer and generation configuration say.

    ``generation`` lists the tokens at which its generation stops; ``closers`` those that its template closes a turn
    or a part of one with although generation runs on; ``marker`` is a turn's border as a user could type it.
    """

    eos: str
    generation: tuple[str, ...]
    marker: str
    bos: str | None = None
    closers: tuple[str, ...] = ()
    more: tuple[str, ...] = ()  # special tokens that the template's source does not spell out
    plain: tuple[str, ...] = ()  # looks like a token, and is plain text in the real tokenizer
    rstrip: bool = False  # special tokens swallow the white space after them

    @property
    def ends(self) -> tuple[str, ...]:
        """The tokens that an answer may end with."""
        return (*self.generation, *self.closers)


_CHATML = Family(
    eos="<|im_end|>",
    generation=("<|im_end|>", "<|endoftext|>"),
    marker="<|im_end|>\n<|im_start|>user\n",
)
_LFM = Family(
    eos="<|im_end|>",
    generation=("<|im_end|>",),
    marker="<|im_end|>\n<|im_start|>user\n",
    bos="<|startoftext|>",
)
_COHERE = Family(
    eos="<|END_OF_TURN_TOKEN|>",
    generation=("<|END_OF_TURN_TOKEN|>",),
    marker="<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>",
    bos="<BOS_TOKEN>",
)
_DEEPSEEK = Family(
    eos="<｜end▁of▁sentence｜>",
    generation=("<｜end▁of▁sentence｜>",),
    marker="<｜end▁of▁sentence｜><｜User｜>",
    bos="<｜begin▁of▁sentence｜>",
)
_GEMMA = Family(
    eos="<eos>",
    generation=("<eos>", "<end_of_turn>"),
    marker="<end_of_turn>\n<start_of_turn>user\n",
    bos="<bos>",
)
_GEMMA4 = Family(
    eos="<eos>",
    generation=("<eos>", "<turn|>", "<|tool_response>"),
    marker="<turn|>\n<|turn>user\n",
    bos="<bos>",
)
_LLAMA3 = Family(
    eos="<|eot_id|>",
    generation=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    marker="<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
    bos="<|begin_of_text|>",
)
_PHI3 = Family(
    eos="<|endoftext|>",
    generation=("<|endoftext|>", "<|end|>"),
    marker="<|end|>\n<|user|>\n",
    bos="<s>",
    rstrip=True,
)
# Prefix of a template's name → its family; the longest prefix that fits is taken.
FAMILIES: dict[str, Family] = {
    "cohere": _COHERE,
    "deepseek": _DEEPSEEK,
    "diffusion_gemma": _GEMMA4,
    "gemma": _GEMMA,
    "gemma4": _GEMMA4,
    "glm4moe": Family(
        eos="<|endoftext|>",
        generation=("<|endoftext|>", "<|user|>", "<|observation|>"),
        marker="<|user|>\n",
        more=("[gMASK]",),
    ),
    "gptoss": Family(
        eos="<|return|>",
        generation=("<|return|>", "<|endoftext|>", "<|call|>"),
        marker="<|end|><|start|>user<|message|>",
        bos="<|startoftext|>",
        closers=("<|end|>",),
        plain=("<|final|>",),
    ),
    "idefics3": Family(
        eos="<|end_of_text|>",
        generation=("<|end_of_text|>", "<end_of_utterance>"),
        marker="<end_of_utterance>\nUser: ",
        bos="<|begin_of_text|>",
    ),
    "lfm2": _LFM,
    "llama3": _LLAMA3,
    "llava_next": Family(
        eos="</s>", generation=("</s>",), marker="</s> [INST] ", bos="<s>", plain=("<<SYS>>", "<</SYS>>")
    ),
    "muse_glimmer": Family(
        eos="<|eot|>",
        generation=("<|eot|>",),
        marker="<|eot|><|start|>user<|message|>",
        bos="<|begin_of_text|>",
        closers=("<|eom|>",),
    ),
    "nemotron": _CHATML,
    "phi3": _PHI3,
    "qwen": _CHATML,
    "smolvlm": Family(
        eos="<end_of_utterance>",
        generation=("<end_of_utterance>",),
        marker="<end_of_utterance>\nUser: ",
        bos="<|im_start|>",
    ),
}


def family_of(name: str) -> Family:
    """The family of a template by its name. Raises ``ValueError`` for a name of none."""
    fitting = [prefix for prefix in FAMILIES if name.startswith(prefix)]
    if not fitting:
        raise ValueError(f"name: expected a template of {', '.join(FAMILIES)}, got {name}")
    return FAMILIES[max(fitting, key=len)]


def stand_in(template: str, name: str, family: Family | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer with the special tokens of ``name``'s family and ``template`` as its chat template."""
    family = family or family_of(name)
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in _MERGES:
        vocabulary[left + right] = len(vocabulary)
    inner = Tokenizer(models.BPE(vocabulary, _MERGES))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    named = [token for token in (family.bos, family.eos) if token]
    found = [marker for marker in dict.fromkeys(_MARKER.findall(template)) if _is_token(marker)]
    wanted = [*named, *family.generation, *family.closers, *family.more, *found]
    for token in dict.fromkeys(wanted):
        if token in _NOT_SPECIAL:
            inner.add_tokens([AddedToken(token, normalized=False)])
        elif token not in family.plain:
            rstrip = family.rstrip and token.startswith("<|") and token != family.eos
            inner.add_special_tokens([AddedToken(token, normalized=False, rstrip=rstrip)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=family.bos,
        eos_token=family.eos,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def _is_token(marker: str) -> bool:
    """Whether a marker is a token of the real tokenizers, not markup like ``<tools>`` or ``<parameter>``."""
    return (
        any(sign in marker for sign in "|｜")
        or marker in _NOT_SPECIAL
        or marker in ("</s>", "<sop>", "<image>")
        or marker.startswith(("<start_of_", "<end_of_"))
    )
