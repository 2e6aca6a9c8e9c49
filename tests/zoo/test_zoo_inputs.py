"""`zoo.processor` and `zoo.expand_image_tokens`: tokens, images, padding and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_zoo import IMAGE, PATCHES, TOWER, config_json, write, write_tiktoken, write_words

from dynmoe_tutel import zoo
from dynmoe_tutel.zoo.vocabularies import VOCABULARIES

ROOM = 640  # vocabulary of these configurations: more than all tokens


def folder_with(tmp_path: Path, family: str = "qwen", **changed: Any) -> Path:
    import json

    raw = {**config_json(family), "vocab_size": ROOM, "tokenizer_model_max_length": 400, **changed}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return tmp_path


def picture(width: int = 24, height: int = 12) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("vocabulary", VOCABULARIES, ids=lambda each: each.file)
def test_vocabularies_of_tiktoken(vocabulary: Any, tmp_path: Path) -> None:
    ranks = write_tiktoken(folder_with(tmp_path) / vocabulary.file)
    tokenizer = zoo.processor(tmp_path, TOWER).tokenizer
    the, cat = 257, 256 + 5
    assert tokenizer("the cat").input_ids == [the, cat]
    assert tokenizer("12").input_ids == [ord("1"), ord("2")]
    for text in ("the cat, a café\n\n  x", "日本 🙂", "don't  tab\t"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("cafe\u0301").input_ids == tokenizer("café").input_ids
    first = ranks + vocabulary.gap
    assert tokenizer.convert_tokens_to_ids(list(vocabulary.special)) == list(
        range(first, first + len(vocabulary.special))
    )
    assert tokenizer("the<|endoftext|>").input_ids == [the, first]
    assert (tokenizer.eos_token_id, tokenizer.padding_side) == (first, "left")


def test_special_tokens_have_the_ids_of_whole_vocabularies() -> None:
    """Qwen's 208 from 151643 on; arcade100k's from 100257 on, of which the last is 100288."""
    qwen, arcade = VOCABULARIES
    assert 151643 + qwen.gap + len(qwen.special) - 1 == 151850
    assert 100256 + arcade.gap + len(arcade.special) - 1 == 100288
    assert [arcade.special.index(name) for name in ("<|fim_prefix|>", "<gh_stars>", "<|im_start|>", "<|reg0|>")] == [
        1,
        5,
        20,
        23,
    ]


def test_the_prompt_is_llavas_with_the_image_before_the_text(tmp_path: Path) -> None:
    write_tiktoken(folder_with(tmp_path) / "qwen.tiktoken")
    process = zoo.processor(tmp_path, TOWER)
    inputs = process("What is this?", picture())
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(ROOM - 1) == PATCHES
    at = ids.index(ROOM - 1)
    assert ids[at : at + PATCHES] == [ROOM - 1] * PATCHES
    before, after = process.tokenizer.decode(ids[:at]), process.tokenizer.decode(ids[at + PATCHES :])
    assert before.endswith("polite answers to the user's questions. USER: ")
    assert after == "\nWhat is this? ASSISTANT:"
    assert inputs["pixel_values"].shape == (1, 3, IMAGE, IMAGE)
    assert process.decode([*ids, process.stop]).endswith("What is this? ASSISTANT:")


def test_images_are_padded_to_a_square_of_the_mean_colour(tmp_path: Path) -> None:
    write_tiktoken(folder_with(tmp_path) / "qwen.tiktoken")
    process = zoo.processor(tmp_path, TOWER)
    pixels = process.pixels([picture(32, 16)])
    assert process.seen(picture(32, 16)).size == (32, 32)
    assert pixels[0, :, 0].abs().max() < 0.03  # the mean colour is 0 once normalised
    assert pixels[0, :, IMAGE // 2].abs().max() > 0.3
    folder_with(tmp_path, image_aspect_ratio="square")
    process = zoo.processor(tmp_path, TOWER)
    assert process.pixels([picture(32, 16)])[0, :, 0].abs().max() > 0.3
    assert process.seen(picture(32, 16)).tobytes() == picture(32, 16).crop((8, 0, 24, 16)).tobytes()


def test_batches_are_padded_on_the_left_and_labels_hold_the_answers(tmp_path: Path) -> None:
    write_tiktoken(folder_with(tmp_path) / "qwen.tiktoken")
    process = zoo.processor(tmp_path, TOWER)
    inputs = process(["Short", "A longer question"], [picture(), None], ["the cat", "a"])
    assert inputs["pixel_values"].shape[0] == 1
    for ids, mask, labels in zip(*(inputs[k] for k in ("input_ids", "attention_mask", "labels")), strict=True):
        assert mask.tolist() == sorted(mask.tolist())
        assert torch.equal(ids[labels != -100], labels[labels != -100])
        assert not mask[labels != -100].eq(0).any()
    learnt = [process.tokenizer.decode(row[row != -100]) for row in inputs["labels"]]
    assert learnt == [" the cat<|endoftext|>", " a<|endoftext|>"]
    whole = process.tokenizer.decode(inputs["input_ids"][1])
    assert whole.endswith("USER: A longer question ASSISTANT: a<|endoftext|>")


def test_a_tokenizer_json_is_read(tmp_path: Path) -> None:
    write_words(folder_with(tmp_path, "phi"), ("red", "blue"))
    process = zoo.processor(tmp_path, TOWER)
    assert process.tokenizer("redblue").input_ids == [256, 257]
    assert process.stop == 258
    assert process.decode([256, 257, 258]) == "redblue"


def test_image_tokens_are_expanded(checkpoint: Path, family: str) -> None:
    model = zoo.load(checkpoint, image_tower=TOWER)
    one = model.config.image_token_id
    assert zoo.expand_image_tokens(model, [3, -200, 4]).tolist() == [3, *[one] * PATCHES, 4]
    batch = zoo.expand_image_tokens(model, torch.tensor([[-200, 1], [2, -200]]))
    assert batch.tolist() == [[*[one] * PATCHES, 1], [2, *[one] * PATCHES]]
    with pytest.raises(ValueError, match="different numbers of images"):
        zoo.expand_image_tokens(model, [[-200, 1], [2, 3]])
    with pytest.raises(ValueError, match=r"integers \[L\] or \[B, L\], got torch.float32"):
        zoo.expand_image_tokens(model, torch.zeros(3))


def test_refusals(tmp_path: Path) -> None:
    folder_with(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer: none of qwen"):
        zoo.processor(tmp_path, TOWER)
    (tmp_path / "qwen.tiktoken").write_text("YQ== 0\nnot base64")
    with pytest.raises(ValueError, match="line 2: a token in base64 and its rank"):
        zoo.processor(tmp_path, TOWER)
    write_tiktoken(tmp_path / "qwen.tiktoken")
    process = zoo.processor(tmp_path, TOWER)
    with pytest.raises(ValueError, match="the text has 1 times <image>, and there are 2 images"):
        process("<image> and", [picture(), picture()])
    with pytest.raises(ValueError, match="give a list with an entry for each of 2 texts"):
        process(["a", "b"], [picture()])
    with pytest.raises(ValueError, match="answers: there are 1, and 2 texts"):
        process(["a", "b"], answers=["c"])
    with pytest.raises(ValueError, match="is no image that can be read"):
        process("a", tmp_path / "config.json")
    with pytest.raises(ValueError, match="tokenizer_model_max_length is 400"):
        process("a" * 400)
    folder_with(tmp_path, vocab_size=300)
    with pytest.raises(ValueError, match="has ids up to 469, and vocab_size = 300 leaves no unused id"):
        zoo.processor(tmp_path, TOWER)


def test_a_whole_answer(tmp_path: Path) -> None:
    write(tmp_path, "qwen")
    model = zoo.load(tmp_path, image_tower=TOWER)
    words = zoo.Processor(FakeTokenizer(), zoo_images(), model.config.image_token_id, PATCHES, max_length=40)
    inputs = words("hi", picture())
    answer = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 3


class FakeTokenizer:
    """Three ids for any text: the tiny model's vocabulary has no room for bytes."""

    eos_token_id, pad_token_id = 0, 0

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [1, 2, 3]}


def zoo_images() -> Any:
    import transformers

    return transformers.CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE}
    )
