"""A BERT of a few thousand weights and small files of rated sentences, for tests of the language experiment."""

from __future__ import annotations

from pathlib import Path

import torch

from dynmoe_tutel.experiments.language.sentiment import FILES

WORDS = [f"w{n}" for n in range(40)] + ["good", "bad"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def write_model(folder: Path) -> Path:
    """Write a BERT of three layers with random weights, and its tokenizer."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]) + "\n")
    tokenizer = BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), vocab=str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def write_texts(folder: Path, seed: int = 0) -> Path:
    """Write the four files: documents of two sentences with "good" or "bad" among other words."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    for name, (stem, _) in FILES.items():
        lines = []
        for document in range(30):
            for sentence in range(2):
                length = int(torch.randint(2, 9, (), generator=generator))
                words = [WORDS[i] for i in torch.randint(0, 40, (length,), generator=generator).tolist()]
                good = bool(torch.randint(0, 2, (), generator=generator))
                text = " ".join([name, *words, "good" if good else "bad"])
                lines.append(f"{document}_{sentence}\t{2.0 if good else -2.0}\t{text}\r\n")
        (folder / f"{stem}_GroundTruth.txt").write_text("".join(lines), newline="")
    return folder
