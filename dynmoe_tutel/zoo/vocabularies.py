"""The tokenizer in a checkpoint's folder as a fast tokenizer of transformers, without the checkpoint's own code.

Two families keep the vocabulary of tiktoken: on each line a token in base64 and its rank. Special tokens follow it.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .hugging_face import needed, transformers

STOP = "<|endoftext|>"
# splits text before byte pairs are merged: digits stay single
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_CODE = (
    "<gh_stars>",
    *(f"<{name}>" for name in ("filename", "issue_start", "issue_comment", "issue_closed")),
    *(f"<jupyter_{name}>" for name in ("start", "text", "code", "output")),
    *(f"<{name}>" for name in ("empty_output", "commit_before", "commit_msg", "commit_after", "reponame")),
)
_FILL = tuple(f"<|fim_{name}|>" for name in ("prefix", "middle", "suffix", "pad"))
_CHAT = ("<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary of tiktoken: `special` tokens come `gap` ids after the last rank."""

    file: str
    special: tuple[str, ...]
    gap: int = 0


VOCABULARIES = (
    Vocabulary("qwen.tiktoken", (STOP, *_CHAT, *(f"<|extra_{i}|>" for i in range(205)))),
    Vocabulary(
        "arcade100k.tiktoken",
        (
            STOP,
            *_FILL,
            *_CODE,
            "<|endofprompt|>",
            *_CHAT,
            "<|pause|>",
            *(f"<|reg{i}|>" for i in range(8)),
            "<|extra0|>",
        ),
        gap=1,
    ),
)


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`, which pads on the left; ValueError where there is none that can be read.

    Looked for are `qwen.tiktoken` and `arcade100k.tiktoken`, then `tokenizer.json`, then `vocab.json` and `merges.txt`.
    """
    found: Any
    vocabulary = next((each for each in VOCABULARIES if (folder / each.file).is_file()), None)
    if vocabulary is not None:
        found = transformers.PreTrainedTokenizerFast(tokenizer_object=_of_ranks(folder, vocabulary), eos_token=STOP)
    elif (folder / "tokenizer.json").is_file():
        found = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        found = transformers.CodeGenTokenizer.from_pretrained(folder)
    else:
        names = ", ".join(each.file for each in VOCABULARIES)
        raise ValueError(f"{folder} has no tokenizer: none of {names}, tokenizer.json, vocab.json with merges.txt")
    if STOP in found.get_vocab():
        found.eos_token = STOP
    if found.eos_token is None:
        raise ValueError(f"the tokenizer in {folder} has neither {STOP!r} nor an eos_token, at which answers stop")
    if found.pad_token is None:
        found.pad_token = found.eos_token
    found.padding_side = "left"
    return found


def read_ranks(path: Path) -> dict[bytes, int]:
    """The ranks of tokens; ValueError that names the line where the file is no vocabulary of tiktoken."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"{path}, line {number}: a token in base64 and its rank were expected") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: its ranks are not 0 to {len(ranks) - 1}")
    return ranks


def _of_ranks(folder: Path, vocabulary: Vocabulary) -> Any:
    """The tokenizer of a vocabulary of tiktoken."""
    ranks = read_ranks(folder / vocabulary.file)
    tokenizers = needed("tokenizers")

    class Converter(needed("transformers.convert_slow_tokenizer").TikTokenConverter):  # type: ignore[misc]
        """Of ranks that were read already: transformers would want tiktoken to read them."""

        @staticmethod
        def load_tiktoken_bpe(_: Any) -> dict[bytes, int]:
            return ranks

        def extract_vocab_merges_from_model(self, path: Any) -> Any:
            vocab, merges = super().extract_vocab_merges_from_model(path)
            unused = {f"<|unused{i}|>": len(ranks) + i for i in range(vocabulary.gap)}
            return {**vocab, **unused}, merges

    converter = Converter(vocab_file="", pattern=PATTERN, extra_special_tokens=list(vocabulary.special))
    found = converter.converted()
    found.normalizer = tokenizers.normalizers.NFC()
    return found
