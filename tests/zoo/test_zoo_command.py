"""`dynmoe-tutel zoo`: the answer, k by layer, the picture, and the average over a file of prompts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_zoo import PATCHES, TOWER, V, write, write_tiktoken
from transformers import CLIPVisionConfig

from dynmoe_tutel import MoELayer, zoo
from dynmoe_tutel.cli.zoo import read_questions
from dynmoe_tutel.metrics import moe_layers

testing = pytest.importorskip("typer.testing")

PROMPT = "What is it?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DynMoE-Qwen with a tokenizer, its tower and an image."""
    made = tmp_path_factory.mktemp("zoo")
    limits = {"seq_length": 400, "max_position_embeddings": 400, "tokenizer_model_max_length": 400}
    write(made, "qwen", **limits)
    write_tiktoken(made / "qwen.tiktoken")
    CLIPVisionConfig(**TOWER).save_pretrained(made / "tower")
    pixels = np.random.default_rng(0).integers(0, 255, (12, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(made / "photo.png")
    return made


def said(*arguments: object, code: int = 0) -> str:
    from dynmoe_tutel.cli import app

    result = testing.CliRunner().invoke(app, ["zoo", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def expected(folder: Path, max_k: int | None = None) -> tuple[str, torch.Tensor]:
    """The greedy answer of 8 tokens, and k [layers, tokens], by hooks of the test's own."""
    process, model = zoo.processor(folder, TOWER), zoo.load(folder, image_tower=TOWER)
    inputs = process(PROMPT, folder / "photo.png")
    seen: dict[str, list[torch.Tensor]] = {}
    for name, layer in moe_layers(model).items():
        layer.register_forward_hook(
            lambda m, args, _, name=name: seen.setdefault(name, []).append(m.route(args[0], max_k=max_k).k_per_token)
        )
        plain = layer.forward
        layer.forward = lambda *a, plain=plain, **k: plain(*a, **{**k, "max_k": max_k})  # type: ignore[method-assign]
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=process.stop)
    answer = process.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(answer.split()), torch.stack([torch.cat(ks) for ks in seen.values()])


@pytest.mark.parametrize("max_k", [None, 1])
def test_an_answer_its_table_and_its_picture(folder: Path, tmp_path: Path, max_k: int | None) -> None:
    answer, k_LT = expected(folder, max_k)
    limit = [] if max_k is None else ["--max-k", max_k]
    options = ["--image-tower", folder / "tower", "--max-new-tokens", 8, "--picture", tmp_path / "k.png", *limit]
    output = said(folder, "--image", folder / "photo.png", "--prompt", PROMPT, *options)
    assert output.startswith(answer)
    rows = re.findall(r"layers\.(\d) (\d) of 4 ([\d.]+) ([\d.]+) ([\d.]+) ([\d.]+)", output)
    assert [(row[0], row[1]) for row in rows] == [("0", "3"), ("2", "4")]
    assert [row[-1] for row in rows] == [f"{k.float().mean():.2f}" for k in k_LT]
    ids = zoo.processor(folder, TOWER)(PROMPT, folder / "photo.png")["input_ids"][0]
    of_image = k_LT[:, : len(ids)][:, ids == V - 1]
    assert of_image.shape[1] == PATCHES
    assert [row[2] for row in rows] == [f"{k.float().mean():.2f}" for k in of_image]
    assert (k_LT.max() == 1) == (max_k == 1)
    with Image.open(tmp_path / "k.png") as drawn:
        assert drawn.size[0] > 1000
        assert len(drawn.convert("RGB").getcolors(10**6) or ()) > 1000


def test_the_average_over_a_file_of_prompts(folder: Path, tmp_path: Path) -> None:
    questions = [{"text": PROMPT, "image": "photo.png"}, {"prompt": "And the cat?"}]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    (tmp_path / "questions.txt").write_text("And the cat?\n\n")
    process, model = zoo.processor(folder, TOWER), zoo.load(folder, image_tower=TOWER)
    ks = []
    for text, image in ((PROMPT, folder / "photo.png"), ("And the cat?", None)):
        with zoo.TokenActivity(model) as activity:
            model(**process(text, image))
            ks.append(activity.k_LT())
    average = torch.cat(ks, dim=1).float().mean()
    for name in ("questions.jsonl", "questions.json"):
        output = said(folder, "--stats", tmp_path / name, "--images", folder, "--image-tower", folder / "tower")
        assert f"average top-k: {average:.2f} over {sum(k.shape[1] for k in ks)} tokens of 2 prompts" in output
    output = said(folder, "--stats", tmp_path / "questions.txt", "--image-tower", folder / "tower")
    assert f"average top-k: {ks[1].float().mean():.2f} over {ks[1].shape[1]} tokens of 1 prompts" in output
    more = said(
        *(folder, "--stats", tmp_path / "questions.txt", "--image-tower", folder / "tower", "--max-new-tokens", 3)
    )
    assert f"over {ks[1].shape[1] + 2} tokens" in more


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt"])
def test_a_separator_within_a_prompt_does_not_end_it(name: str, tmp_path: Path) -> None:
    """U+2028 and U+0085 may stand in JSON strings, and str.splitlines cuts at them."""
    prompts = ["one\u2028line", "two\x85", "Grüße"]
    entries = [json.dumps({"text": prompt}, ensure_ascii=False) for prompt in prompts]
    whole = {".json": f"[{','.join(entries)}]", ".jsonl": "\n".join(entries), ".txt": "\n".join(prompts)}
    (tmp_path / name).write_text(whole[Path(name).suffix], encoding="utf-8")
    found = [question.text for question in read_questions(tmp_path / name, tmp_path)]
    assert [text.strip() for text in found] == [prompt.strip() for prompt in prompts]


@pytest.mark.parametrize(
    ("text", "message"), [("5", "holds a int, not a list"), ('[{"text": "x", "image": 5}]', "entry 1: give an object")]
)
def test_a_file_of_other_json_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        list(read_questions(tmp_path / "a.json", tmp_path))


def test_a_limit_keeps_the_target_and_its_shift() -> None:
    options = {"experts": {"num_experts_per_device": 4, "hidden_size_per_expert": 8}, "model_dim": 8}
    layers = torch.nn.Sequential(
        MoELayer({"type": "top_any", "budget": {"target_k": 2.0, "max_k": 3}}, **options),
        MoELayer({"type": "top_any"}, **options),
    )
    held, free = (layer.gates[0] for layer in layers)
    held.budget_shift.fill_(0.25)
    zoo.limit_k(layers, 2)
    assert (held.budget.target_k, held.budget.max_k, free.budget.max_k) == (2.0, 2, 2)
    with pytest.raises(ValueError, match="target_k"):
        zoo.limit_k(layers, 1)
    assert (held.budget.max_k, free.budget.max_k) == (2, 2)
    zoo.limit_k(layers, None)
    assert (held.budget.target_k, held.budget.max_k, free.budget) == (2.0, None, None)
    assert held.budget_shift.item() == 0.25


def test_a_limit_that_one_gate_cannot_hold_changes_none() -> None:
    options = {"experts": {"num_experts_per_device": 4, "hidden_size_per_expert": 8}, "model_dim": 8}
    layers = torch.nn.Sequential(MoELayer({"type": "top_any"}, **options), MoELayer({"type": "top", "k": 2}, **options))
    with pytest.raises(ValueError, match="is no top-any gate"):
        zoo.limit_k(layers, 1)
    assert layers[0].gates[0].budget is None


def test_refusals(folder: Path, tmp_path: Path) -> None:
    assert "give --prompt" in said(folder, code=2)
    assert "has no config.json" in said(tmp_path, "--prompt", "x", code=2)
    (tmp_path / "bad.jsonl").write_text('{"image": "a.png"}')
    assert "entry 1: give an object with 'text'" in said(folder, "--stats", tmp_path / "bad.jsonl", code=2)
    (tmp_path / "none.txt").write_text("\n")
    assert "has no prompt" in said(folder, "--stats", tmp_path / "none.txt", code=2)
    tower = ["--image-tower", folder / "tower"]
    assert "max_k" in said(folder, "--prompt", "x", "--max-k", 0, *tower, code=2)
    assert "dtype = 'bf16'" in said(folder, "--prompt", "x", "--dtype", "bf16", *tower, code=2)
