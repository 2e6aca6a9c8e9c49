"""Turn a vision-language model into a mixture of experts by MoE-LLaVA's recipe, train it, save it, ask it.

Run: python examples/vision_language.py

The model is a tiny random Llava of transformers. Its images are drawn here: which colour covers more of the picture?
Needs the extra [hf].
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers

from dynmoe_tutel import zoo
from dynmoe_tutel.integrations.transformers import DynMoECallback

STEPS, SIDE = 100, 32
COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220)}
QUESTION = "Which colour ?"

random.seed(0)
torch.manual_seed(0)
transformers.utils.logging.disable_progress_bar()


def word_tokenizer() -> Any:
    """A tokenizer of words, for want of a real one."""
    words = sorted({*f"{zoo.SYSTEM} USER: {QUESTION} ASSISTANT:".split(), *COLOURS})
    known = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<|endoftext|>", "?", *words])}, "?"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=known, eos_token="<|endoftext|>", pad_token="<|endoftext|>", padding_side="left"
    )


def picture() -> tuple[Image.Image, str]:
    """Two rectangles of different size, and the colour of the larger one."""
    larger, smaller = random.sample(list(COLOURS), 2)
    image = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(image)
    x, y = random.randrange(4), random.randrange(4)
    draw.rectangle((x, y, x + 19, y + 19), fill=COLOURS[larger])
    draw.rectangle((SIDE - 10, SIDE - 10, SIDE - 3, SIDE - 3), fill=COLOURS[smaller])
    return image, larger


tokenizer = word_tokenizer()
vision = transformers.CLIPVisionConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=8
)
text = transformers.StableLmConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=4, use_qkv_bias=True, bos_token_id=None, eos_token_id=0,
)  # fmt: skip
config = transformers.LlavaConfig(
    vision_config=vision, text_config=text, image_token_index=63, image_seq_length=(SIDE // 8) ** 2
)
model = transformers.LlavaForConditionalGeneration(config)
images = transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
process = zoo.Processor(tokenizer, images, config.image_token_id, config.image_seq_length)

zoo.convert(model, {"moe_mode": "sparse", "num_experts": [4]})  # every second MLP, 4 slots, 2 active
model.model.vision_tower.requires_grad_(False)


def collated(batch: list[Any]) -> Any:
    """The Trainer's batch: images drawn anew, labels that hold the answers alone."""
    drawn = [picture() for _ in batch]
    return process([QUESTION] * len(drawn), [image for image, _ in drawn], [answer for _, answer in drawn])


with tempfile.TemporaryDirectory() as scratch:
    arguments = transformers.TrainingArguments(
        output_dir=scratch, max_steps=STEPS, per_device_train_batch_size=16, learning_rate=3e-3, logging_steps=20,
        save_strategy="no", report_to="none", remove_unused_columns=False, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, data_collator=collated, train_dataset=list(range(16 * STEPS)))
    trainer.add_callback(DynMoECallback(trainer, schedule=40, aux_weight=config.moe["router_aux_loss_coef"]))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")

    folder = zoo.save(model, Path(scratch) / "zoo", image_tower="a/tiny-tower")
    loaded = zoo.load(folder, image_tower=vision)

right, asked = 0, 50
with zoo.TokenActivity(loaded) as activity:
    for _ in range(asked):
        image, answer = picture()
        inputs = process(QUESTION, image)
        ids = loaded.generate(**inputs.to(loaded.device), max_new_tokens=1, do_sample=False)
        right += process.decode(ids[0, inputs["input_ids"].shape[1] :]) == answer
    k = activity.k_LT().float().mean(dim=1)
for (name, layer), mean in zip(activity.layers.items(), k.tolist(), strict=True):
    print(f"{name}: {layer.num_global_experts} experts, {mean:.2f} a token")
print(f"right answers: {right / asked:.0%}")
