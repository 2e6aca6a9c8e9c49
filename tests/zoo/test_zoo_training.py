"""A Llava of one's own by MoE-LLaVA's recipe, and loaded checkpoints, trained with the Trainer and the callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import FP32, relative_rms
from test_zoo_load import inputs
from tiny_zoo import HEADS, IMAGE, PATCHES, TOWER, D, V, write
from torch.utils.data import Dataset

from dynmoe_tutel import zoo
from dynmoe_tutel.integrations.transformers import DynMoECallback
from dynmoe_tutel.metrics import moe_layers

LENGTH = 12


def dense(family: str = "stablelm", layers: int = 4) -> Any:
    """A tiny Llava of transformers with random weights."""
    torch.manual_seed(0)
    kind = {"stablelm": transformers.StableLmConfig, "phi": transformers.PhiConfig, "qwen": transformers.Qwen2Config}
    text = kind[family](
        vocab_size=V,
        hidden_size=D,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=64,
    )
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER), text_config=text, image_token_index=V - 1
    )
    config.image_seq_length = PATCHES
    return transformers.LlavaForConditionalGeneration(config).eval()


class Colours(Dataset[Any]):
    """Images that are dark or bright, with the answer behind them."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> dict[str, Any]:
        bright = i % 2
        generator = torch.Generator().manual_seed(i)
        ids = torch.tensor([*[V - 1] * PATCHES, *torch.randint(9, 99, (LENGTH - 1,), generator=generator), bright])
        labels = torch.where(torch.arange(len(ids)) == len(ids) - 1, ids, -100)
        pixels = torch.randn(3, IMAGE, IMAGE, generator=generator) + 2 * bright - 1
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}


def trained(model: Any, folder: Path, steps: int = 12, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        max_steps=steps,
        learning_rate=3e-3,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=Colours())
    callback = DynMoECallback(trainer, schedule={"every": 4}, aux_weight=0.01)
    trainer.add_callback(callback)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    return callback


def test_the_recipe_keeps_the_dense_function(family: str) -> None:
    model = dense(family)
    with torch.no_grad():
        before = model(**inputs(True)).logits
        zoo.convert(model)
        after = model(**inputs(True)).logits
    assert (before - after).abs().max() < 1e-5
    layers = moe_layers(model)
    assert list(layers) == [f"model.language_model.layers.{i}.mlp" for i in (0, 2)]
    assert {(layer.num_global_experts, layer.slots) for layer in layers.values()} == {(2, 4)}
    assert model.config.moe["moe_layers_idx"] == [0, 2]
    assert model.config.moe["num_experts"] == [4, 4]


@pytest.mark.parametrize("experts", ["grouped", "modules"])
def test_it_trains_grows_and_becomes_a_checkpoint(family: str, experts: str, tmp_path: Path) -> None:
    model = zoo.convert(dense(family), experts=experts)
    model.model.vision_tower.requires_grad_(False)
    before = {name: layer.held_experts.dense_view("up")[0].clone() for name, layer in moe_layers(model).items()}
    callback = trained(model.train(), tmp_path)
    assert callback.controller is not None
    for name, layer in moe_layers(model).items():
        assert not torch.equal(layer.held_experts.dense_view("up")[0], before[name])
    zoo.save(model.eval(), tmp_path / "zoo", image_tower="a/tiny-tower")
    again = zoo.load(tmp_path / "zoo", image_tower=TOWER)
    given = inputs(True)
    with torch.no_grad():
        assert (again(**given).logits - model(**given).logits).abs().max() < 1e-5
    counts = [[layer.num_global_experts for layer in moe_layers(m).values()] for m in (model, again)]
    assert counts[0] == counts[1]
    assert again.config.moe == model.config.moe


def test_modes_and_slots_by_layer() -> None:
    model = zoo.convert(dense(), {"moe_mode": "second_half", "num_experts": [2, 6]}, active=1)
    assert {name[-5]: layer.slots for name, layer in moe_layers(model).items()} == {"2": 2, "3": 6}
    assert {layer.num_global_experts for layer in moe_layers(model).values()} == {1}
    layer = next(iter(moe_layers(zoo.convert(dense(), {"moe_layers_idx": [3]})).values()))
    layer(torch.zeros(3, D))
    assert set(layer.aux_terms) == {"diversity", "simplicity", "load_balance", "efficiency"}


def test_a_checkpoint_trains_in_bf16_with_gradient_checkpointing(tmp_path: Path) -> None:
    write(tmp_path / "in", "stablelm", torch.bfloat16)
    model = zoo.load(tmp_path / "in", image_tower=TOWER).train()
    trained(model, tmp_path / "out", bf16=True, gradient_checkpointing=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    zoo.save(model, tmp_path / "again")


def test_lora_on_attention(checkpoint: Path, family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = zoo.load(checkpoint, image_tower=TOWER)
    targets = r".*language_model.*self_attn\.[qv]_proj"
    lora = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=[])
    adapted = peft.get_peft_model(model, lora)
    frozen = {n: p.clone() for n, p in adapted.named_parameters() if not p.requires_grad}
    trained(adapted.train(), tmp_path, steps=6)
    assert all(torch.equal(p, frozen[n]) for n, p in adapted.named_parameters() if n in frozen)
    assert len(frozen) < len(list(adapted.parameters()))
    merged = adapted.merge_and_unload().eval()
    zoo.save(merged, tmp_path / "merged")
    again = zoo.load(tmp_path / "merged", image_tower=TOWER)
    with torch.no_grad():
        assert relative_rms(again(**inputs(True)).logits, merged(**inputs(True)).logits) < FP32


def test_training_resumes_from_the_trainers_files(checkpoint: Path, family: str, tmp_path: Path) -> None:
    if family != "qwen":
        pytest.skip("one family will do")

    def run(folder: Path, steps: int, resume: bool) -> Any:
        model = zoo.load(checkpoint, image_tower=TOWER).train()
        arguments = transformers.TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=8, max_steps=4, save_steps=2, report_to="none",
            use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=Colours())
        trainer.add_callback(DynMoECallback(trainer, schedule={"every": 3}))
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
        return model

    whole = run(tmp_path, 4, False)
    resumed = run(tmp_path, 4, True)
    state = resumed.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in whole.state_dict().items())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="must be a LlavaForConditionalGeneration, got Linear"):
        zoo.convert(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="unknown key 'experts_num' in moe"):
        zoo.convert(dense(), {"experts_num": 4})
    with pytest.raises(ValueError, match="active = 5: a layer has 4 slots"):
        zoo.convert(dense(), active=5)
    with pytest.raises(ValueError, match="has MoE layers already"):
        zoo.convert(zoo.convert(dense()))
    with pytest.raises(ValueError, match="no MoE layers of the zoo's: load it by"):
        zoo.save(dense(), "/nowhere")
    with pytest.raises(ValueError, match="image_tower: the tower is none of openai/clip-vit-large-patch14-336"):
        zoo.save(zoo.convert(dense()), "/nowhere")
