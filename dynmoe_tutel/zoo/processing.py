"""`processor`: a checkpoint's inputs from images and text; `expand_image_tokens` for ids that were made elsewhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .configuration import read_config
from .hugging_face import needed, transformers
from .vocabularies import read_tokenizer

IMAGE = "<image>"
IMAGE_ID = -200  # one image in ids of LLaVA's
IGNORED = -100  # in labels
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PREPROCESSOR = "preprocessor_config.json"


def processor(folder: str | os.PathLike[str], image_tower: Any = None) -> Processor:
    """What makes the inputs of the checkpoint in `folder`; `image_tower` as for `load`.

    Raises ValueError where the folder has no tokenizer that can be read, or its vocabulary does not fit the model's.
    """
    folder = Path(folder)
    _, config = read_config(folder, image_tower)
    tokenizer = read_tokenizer(folder)
    highest = max(tokenizer.get_vocab().values())
    if highest >= config.image_token_id:
        raise ValueError(
            f"the tokenizer in {folder} has ids up to {highest}, and vocab_size = {config.image_token_id + 1} leaves "
            "no unused id for image tokens"
        )
    size = config.vision_config.image_size
    images = needed("transformers.models.clip.image_processing_pil_clip").CLIPImageProcessorPil
    if (folder / PREPROCESSOR).is_file():
        image_processor = images.from_pretrained(folder)
    else:
        image_processor = images(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    raw = config.zoo
    return Processor(
        tokenizer,
        image_processor,
        config.image_token_id,
        config.image_seq_length,
        raw.get("image_aspect_ratio") == "pad",
        raw.get("tokenizer_model_max_length"),
    )


class Processor:
    """Images and text to a model's inputs, and ids back to text.

    `tokenizer` pads on the left; `stop` is the id at which an answer ends.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any,
        image_token_id: int,
        image_tokens: int,
        pads_to_square: bool = True,
        max_length: int | None = None,
    ) -> None:
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.image_token_id, self.image_tokens = image_token_id, image_tokens
        self.pads_to_square, self.max_length = pads_to_square, max_length
        self.stop: int = tokenizer.eos_token_id

    def prompt(self, text: str, images: int = 0) -> str:
        """The conversation up to the answer; `images` images precede the text that says nowhere where they are."""
        missing = images - text.count(IMAGE)
        if missing < 0 or (missing and IMAGE in text):
            raise ValueError(f"the text has {text.count(IMAGE)} times {IMAGE}, and there are {images} images")
        return f"{SYSTEM} USER: {(IMAGE + chr(10)) * missing}{text} ASSISTANT:"

    def __call__(
        self, text: str | Sequence[str], images: Any = None, answers: str | Sequence[str] | None = None
    ) -> Any:
        """A `BatchFeature` of `input_ids`, `attention_mask` and, with images, `pixel_values`, for `model(**inputs)`.

        Args:
            text: what the user says, one text or a batch.
            images: for each text an image (of PIL, or a path), a list of images or None; for one text, the same.
            answers: to train on: they and the stop token follow the prompts and are alone in `labels`.

        Raises ValueError where numbers do not agree, or a sequence is longer than `max_length`.
        """
        texts = [text] if isinstance(text, str) else list(text)
        of_texts = _by_text(images, len(texts), isinstance(text, str))
        wanted = [answers] if isinstance(answers, str) else answers
        if wanted is not None and len(wanted) != len(texts):
            raise ValueError(f"answers: there are {len(wanted)}, and {len(texts)} texts")
        rows, learnt = [], []
        for i, (each, own) in enumerate(zip(texts, of_texts, strict=True)):
            ids = self.ids(self.prompt(each, len(own)))
            answer = [] if wanted is None else [*self._text_ids(f" {wanted[i]}"), self.stop]
            rows.append([*ids, *answer])
            learnt.append([*[IGNORED] * len(ids), *answer])
        inputs = self._padded(rows, learnt if wanted is not None else None)
        every = [image for own in of_texts for image in own]
        if every:
            inputs["pixel_values"] = self.pixels(every)
        return transformers.BatchFeature(inputs)

    def ids(self, prompt: str) -> list[int]:
        """The ids of a conversation, with `image_tokens` placeholders for each image."""
        ids: list[int] = []
        for i, part in enumerate(prompt.split(IMAGE)):
            ids += [self.image_token_id] * (self.image_tokens if i else 0) + self._text_ids(part)
        return ids

    def pixels(self, images: Sequence[Any]) -> Tensor:
        """Pixels [images, 3, height, width] of the tower."""
        prepared = [self._square(_opened(image)) for image in images]
        pixels: Tensor = self.image_processor(prepared, return_tensors="pt")["pixel_values"]
        return pixels

    def seen(self, image: Any) -> Any:
        """The square of an image (of PIL, or a path) that the tower sees, for a picture of its patches."""
        whole = self._square(_opened(image))
        side = min(whole.size)
        left, top = ((length - side) // 2 for length in whole.size)
        return whole.crop((left, top, left + side, top + side))

    def decode(self, ids: Any) -> str:
        """The text of ids, without special tokens and placeholders."""
        kept = [i for i in torch.as_tensor(ids).flatten().tolist() if i != self.image_token_id]
        return str(self.tokenizer.decode(kept, skip_special_tokens=True)).strip()

    def _text_ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _padded(self, rows: list[list[int]], learnt: list[list[int]] | None) -> dict[str, Tensor]:
        length = max(map(len, rows))
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"a sequence has {length} tokens, of images too, and tokenizer_model_max_length is {self.max_length}"
            )
        pad = self.tokenizer.pad_token_id
        result = {
            "input_ids": torch.tensor([[*[pad] * (length - len(row)), *row] for row in rows]),
            "attention_mask": torch.tensor([[*[0] * (length - len(row)), *[1] * len(row)] for row in rows]),
        }
        if learnt is not None:
            result["labels"] = torch.tensor([[*[IGNORED] * (length - len(row)), *row] for row in learnt])
        return result

    def _square(self, image: Any) -> Any:
        """The image on a square of the tower's mean colour, as in training."""
        width, height = image.size
        if not self.pads_to_square or width == height:
            return image
        side = max(width, height)
        colour = tuple(int(mean * 255) for mean in self.image_processor.image_mean)
        square = needed("PIL.Image").new("RGB", (side, side), colour)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        return square


def expand_image_tokens(model: Any, ids: Any) -> Tensor:
    """Ids [L] or [B, L] with one placeholder for each patch in the place of each -200, LLaVA's sign of an image.

    `model` is of `load`. Raises ValueError where the rows of a batch would get unequal lengths.
    """
    given = torch.as_tensor(ids)
    if given.dim() not in (1, 2) or given.is_floating_point():
        raise ValueError(f"ids must be integers [L] or [B, L], got {given.dtype} {list(given.shape)}")
    config = model.config
    patches = given.new_full((config.image_seq_length,), config.image_token_id)
    rows = []
    for row in given.reshape(-1, given.shape[-1]):
        pieces = [patches if i == IMAGE_ID else row.new_tensor([i]) for i in row.tolist()]
        rows.append(torch.cat(pieces) if pieces else row)
    if len({len(row) for row in rows}) > 1:
        raise ValueError("ids: the rows have different numbers of images (-200): expand each alone and pad them")
    return torch.stack(rows) if given.dim() == 2 else rows[0]


def _by_text(images: Any, texts: int, single: bool) -> list[list[Any]]:
    """The images of each text."""
    if images is None:
        return [[] for _ in range(texts)]
    if single:
        return [list(images) if isinstance(images, list | tuple) else [images]]
    if not isinstance(images, list | tuple) or len(images) != texts:
        raise ValueError(f"images: give a list with an entry for each of {texts} texts")
    return [[] if own is None else list(own) if isinstance(own, list | tuple) else [own] for own in images]


def _opened(image: Any) -> Any:
    """An image of PIL in RGB; ValueError that names the file where it is none."""
    pillow = needed("PIL.Image")
    if isinstance(image, pillow.Image):
        return image.convert("RGB")
    try:
        return pillow.open(image).convert("RGB")
    except (OSError, AttributeError, ValueError) as error:
        raise ValueError(f"{image} is no image that can be read: {error}") from error
