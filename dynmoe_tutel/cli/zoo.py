"""What `zoo` does: a checkpoint's answer to an image and a prompt, or its average k over a file of prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dynmoe_tutel import zoo
from dynmoe_tutel.cli.k_picture import draw
from dynmoe_tutel.metrics import active_slots
from dynmoe_tutel.zoo.activity import TokenActivity, limit_k
from dynmoe_tutel.zoo.hugging_face import needed

ANSWER_TOKENS = 256
GROUPS = ("image", "text", "answer")


@dataclass(frozen=True)
class Question:
    """A prompt and its image, if any."""

    text: str
    image: Path | None = None


@dataclass(frozen=True)
class Setting:
    """How a checkpoint is loaded and asked."""

    folder: Path
    image_tower: Path | None = None
    max_k: int | None = None
    dtype: str | None = None
    device: str | None = None
    max_new_tokens: int | None = None


def ask(setting: Setting, question: Question, picture: Path, console: Console) -> int:
    """Print the answer as it is generated, then k by layer; draw k over the tokens into the file `picture`."""
    model, process = _opened(setting)
    inputs = _inputs(process, question, model)
    with TokenActivity(model) as activity:
        streamer = _streamer(process, console)
        ids = _answered(model, process, inputs, setting.max_new_tokens or ANSWER_TOKENS, streamer)
        k_LT, groups = activity.k_LT(), _groups(process, ids[0], inputs["input_ids"].shape[1])
        console.print()
        console.print(_table(activity, k_LT, groups[: k_LT.shape[1]]), highlight=False)
    tokens = [process.tokenizer.decode([i]) for i in ids[0].tolist()]
    image = None if question.image is None else process.seen(question.image)
    draw(picture, k_LT.float().mean(dim=0), [GROUPS[g] for g in groups.tolist()], tokens, image)
    console.print(f"k by token: {picture}", highlight=False)
    return 0


def average_k(setting: Setting, data: Path, images: Path | None, console: Console) -> int:
    """Print the average k over the tokens of the prompts in `data`, and of their answers if any are generated."""
    questions = list(read_questions(data, images or data.parent))
    if not questions:
        raise ValueError(f"{data} has no prompt")
    model, process = _opened(setting)
    seen, kinds = [], []
    with TokenActivity(model) as activity:
        for question in questions:
            inputs = _inputs(process, question, model)
            activity.reset()
            if setting.max_new_tokens:
                ids = _answered(model, process, inputs, setting.max_new_tokens, None)
            else:
                ids = inputs["input_ids"]
                with torch.inference_mode():
                    model(**inputs, logits_to_keep=1)
            k_LT = activity.k_LT()
            seen.append(k_LT)
            kinds.append(_groups(process, ids[0], inputs["input_ids"].shape[1])[: k_LT.shape[1]])
        whole, groups = torch.cat(seen, dim=1), torch.cat(kinds)
        console.print(_table(activity, whole, groups), highlight=False)
    console.print(
        f"average top-k: {whole.float().mean():.2f} over {whole.shape[1]} tokens of {len(questions)} prompts",
        highlight=False,
    )
    return 0


def read_questions(data: Path, images: Path) -> Iterator[Question]:
    """The prompts of a file: JSON (a list) or JSON lines of objects with `text` (or `prompt`) and, if any, `image`, a
    path within `images`; or text, a prompt a line. ValueError that names the line or entry."""
    text = data.read_text(encoding="utf-8")
    lines = text.split("\n")  # splitlines would also cut at separators within a prompt
    if data.suffix not in (".json", ".jsonl"):
        yield from (Question(line.strip()) for line in lines if line.strip())
        return
    try:
        whole = data.suffix == ".json"
        entries = json.loads(text) if whole else [json.loads(line) for line in lines if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{data} is not valid JSON: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{data} holds a {type(entries).__name__}, not a list of prompts")
    for number, entry in enumerate(entries, 1):
        prompt = entry.get("text", entry.get("prompt")) if isinstance(entry, dict) else None
        image = entry.get("image") if isinstance(entry, dict) else None
        if not isinstance(prompt, str) or not isinstance(image, str | None):
            raise ValueError(f"{data}, entry {number}: give an object with 'text' (or 'prompt') and, if any, 'image'")
        yield Question(prompt, None if image is None else images / image)


def _opened(setting: Setting) -> tuple[Any, Any]:
    """The model and what makes its inputs."""
    dtype: Any = None if setting.dtype is None else getattr(torch, setting.dtype, setting.dtype)
    needed("transformers").utils.logging.disable_progress_bar()
    process = zoo.processor(setting.folder, setting.image_tower)
    model = zoo.load(setting.folder, dtype, setting.device, setting.image_tower)
    limit_k(model, setting.max_k)
    return model, process


def _inputs(process: Any, question: Question, model: Any) -> Any:
    inputs = process(question.text, question.image).to(model.device)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return inputs


def _answered(model: Any, process: Any, inputs: Any, tokens: int, streamer: Any) -> Tensor:
    """The ids of prompt and answer, the likeliest token at each step."""
    with torch.inference_mode():
        ids: Tensor = model.generate(
            **inputs,
            max_new_tokens=tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=process.stop,
            pad_token_id=process.tokenizer.pad_token_id,
            streamer=streamer,
        )
    return ids


def _groups(process: Any, ids_T: Tensor, prompt: int) -> Tensor:
    """[T]: the index in `GROUPS` of each token."""
    groups = torch.full(ids_T.shape, GROUPS.index("text"))
    groups[(ids_T == process.image_token_id).cpu()] = GROUPS.index("image")
    groups[prompt:] = GROUPS.index("answer")
    return groups


def _table(activity: TokenActivity, k_LT: Tensor, groups_T: Tensor) -> Table:
    """A row a layer: active experts, and the mean k of each group of tokens."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("layer")
    for name in ("experts", *GROUPS, "all tokens"):
        table.add_column(name, justify="right")
    for (name, layer), k_T in zip(activity.layers.items(), k_LT, strict=True):
        experts = f"{len(active_slots(layer))} of {layer.slots}"
        table.add_row(name.removesuffix(".mlp").split(".", 2)[-1], experts, *_means(k_T, groups_T))
    table.add_row("all layers", "", *_means(k_LT.float().mean(dim=0), groups_T))
    return table


def _means(k_T: Tensor, groups_T: Tensor) -> list[str]:
    parts = [k_T[groups_T == group] for group in range(len(GROUPS))]
    return ["-" if part.numel() == 0 else f"{part.float().mean():.2f}" for part in (*parts, k_T)]


def _streamer(process: Any, console: Console) -> Any:
    """A streamer of transformers that prints on the console."""

    class Printed(needed("transformers").TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            console.print(text, end="", markup=False, highlight=False, soft_wrap=True)

    return Printed(process.tokenizer, skip_prompt=True, skip_special_tokens=True)
