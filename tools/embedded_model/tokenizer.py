"""The byte-level BPE tokenizer and the chat template of the embedded model."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from embedded_model.dialogues import Dialogue

BEGIN, END, USER, ASSISTANT, SYSTEM = "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"
SPECIAL_TOKENS = (BEGIN, END, USER, ASSISTANT, SYSTEM)

# Identifiers stay whole with one leading space. Line breaks and the indentation after them are pieces of their
# own, so that a prompt which stops after either is cut into the tokens that training has shown.
PIECES = r"\n+|(?<=\n)[ \t]+| ?[\p{L}_][\p{L}\p{N}_]*| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|[^\S\n]+(?!\S)|[^\S\n]+"

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception('roles are system, user and assistant, not ' + message['role']) -}}
    {%- endif -%}
    {{- '<|' + message['role'] + '|>' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] | trim -}}
    {%- else -%}
        {{- message['content'] | map(attribute='text') | join | trim -}}
    {%- endif -%}
    {%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with `vocab_size` entries; the special tokens have the first ids, in their order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, id_of(tokenizer, BEGIN))]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` in the layout that Hugging Face's loaders read."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def id_of(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that must exist. Raises KeyError when it does not."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise KeyError(token)
    return found


def render(dialogue: Dialogue) -> str:
    """The dialogue as the chat template would write it."""
    parts = [BEGIN]
    if dialogue.system is not None:
        parts.append(f"{SYSTEM}{dialogue.system}")
    for exchange in dialogue.exchanges:
        parts.append(f"{USER}{exchange.request.strip()}{ASSISTANT}{exchange.answer.strip()}{END}")
    return "".join(parts)


def render_snippet(source: str) -> str:
    """One definition as a whole text of its own."""
    return f"{BEGIN}{source.strip()}{END}"


def encode_files(tokenizer: Tokenizer, texts: Sequence[str]) -> list[npt.NDArray[np.uint16]]:
    """Each text as ids between a begin and an end token."""
    end = id_of(tokenizer, END)
    return [np.asarray([*encoding.ids, end], np.uint16) for encoding in tokenizer.encode_batch(list(texts))]


def encode_rendered(tokenizer: Tokenizer, texts: Sequence[str]) -> list[npt.NDArray[np.uint16]]:
    """Each text as ids; the special tokens are those spelled out in it."""
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [np.asarray(encoding.ids, np.uint16) for encoding in encodings]
