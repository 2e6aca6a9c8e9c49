"""`zoo.save`: a loaded checkpoint is written as it was, and what the format cannot hold is refused before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FP32, relative_rms
from safetensors.torch import load_file
from test_zoo_load import inputs
from tiny_zoo import TOWER, write, write_tensors
from torch import Tensor

from dynmoe_tutel import zoo
from dynmoe_tutel.metrics import moe_layers
from dynmoe_tutel.zoo import saving


def written(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("experts", ["grouped", "modules"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bitwise(family: str, dtype: torch.dtype, experts: str, tmp_path: Path) -> None:
    tensors = write(tmp_path / "in", family, dtype, use_cache=False)
    model = zoo.load(tmp_path / "in", image_tower=TOWER, experts=experts)
    assert zoo.save(model, tmp_path / "out") == tmp_path / "out"
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert_equal(written(tmp_path / "out"), tensors)
    read = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("in", "out")]
    read[0]["torch_dtype"] = str(dtype).removeprefix("torch.")
    assert read[0] == read[1]


def test_dtypes_that_differ_by_tensor_come_back(tmp_path: Path) -> None:
    tensors = write(tmp_path / "in", "phi", torch.bfloat16)
    for key, tensor in tensors.items():
        if key.endswith("experts_mask"):
            tensors[key] = tensor.bfloat16()
        elif "vision_model" in key:
            tensors[key] = torch.randn(tensor.shape)
    write_tensors(tmp_path / "in", tensors)
    model = zoo.load(tmp_path / "in", image_tower=TOWER)
    assert model.dtype == torch.float32
    zoo.save(model, tmp_path / "out")
    assert_equal(written(tmp_path / "out"), tensors)


def test_shards_hold_what_their_index_says(tmp_path: Path) -> None:
    tensors = write(tmp_path / "in", "qwen")
    zoo.save(zoo.load(tmp_path / "in", image_tower=TOWER), tmp_path / "out", max_shard_bytes=100_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    for name in set(index["weight_map"].values()):
        own = load_file(tmp_path / "out" / name)
        assert sum(t.nbytes for t in own.values()) <= 100_000
        assert {key for key, file in index["weight_map"].items() if file == name} == own.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert_equal(written(tmp_path / "out"), tensors)
    zoo.load(tmp_path / "out", image_tower=TOWER)


def test_a_model_may_be_saved_over_the_files_that_it_was_loaded_from(tmp_path: Path) -> None:
    """Its dense weights are pages of these files, which must not change: a new file takes the name."""
    tensors = write(tmp_path, "stablelm")
    model = zoo.load(tmp_path, image_tower=TOWER)
    file = (tmp_path / "model.safetensors").stat().st_ino
    with torch.no_grad():
        before = model(**inputs(True)).logits
        zoo.save(model, tmp_path)
        assert torch.equal(model(**inputs(True)).logits, before)
    assert_equal(written(tmp_path), tensors)
    assert (tmp_path / "model.safetensors").stat().st_ino != file
    assert sorted(path.name for path in tmp_path.glob("*.safetensors*")) == ["model.safetensors"]


def test_a_save_that_fails_leaves_the_checkpoint_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of its shards beside others of the former model would load as one."""
    write(tmp_path / "in", "phi")
    model = zoo.load(tmp_path / "in", image_tower=TOWER)
    folder = zoo.save(model, tmp_path / "out", max_shard_bytes=100_000)
    before = written(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    saved, calls = saving._safetensors.save_file, []

    def third_is_too_much(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise OSError("No space left on device")
        saved(tensors, path, **options)

    monkeypatch.setattr(saving._safetensors, "save_file", third_is_too_much)
    with pytest.raises(OSError, match="No space left"):
        zoo.save(model, folder, max_shard_bytes=100_000)
    assert_equal(written(folder), before)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    monkeypatch.undo()
    calls[0].write_bytes(b"what a killed save left")
    zoo.save(model, folder, max_shard_bytes=100_000)
    assert not calls[0].exists()


def test_grown_and_trained_experts_are_saved(checkpoint: Path, family: str, tmp_path: Path) -> None:
    model = zoo.load(checkpoint, image_tower=TOWER)
    layer = next(iter(moe_layers(model).values()))
    with torch.no_grad():
        layer.gates[0].activate(1, torch.ones(layer.model_dim))
        layer.experts.dense_view("up")[2].mul_(2)
    zoo.save(model, tmp_path / "out")
    again = zoo.load(tmp_path / "out", image_tower=TOWER)
    assert next(iter(moe_layers(again).values())).num_global_experts == 4
    with torch.no_grad():
        assert relative_rms(again(**inputs(True)).logits, model(**inputs(True)).logits) < FP32


def test_transformers_own_files_go_both_ways(checkpoint: Path, family: str, tmp_path: Path) -> None:
    """What a Trainer writes."""
    model = zoo.load(checkpoint, image_tower=TOWER)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert relative_rms(again(**inputs(True)).logits, model(**inputs(True)).logits) < FP32
    zoo.save(again, tmp_path / "zoo")
    assert_equal(written(tmp_path / "zoo"), written(checkpoint))


def test_what_the_format_cannot_hold_is_refused(checkpoint: Path, family: str, tmp_path: Path) -> None:
    model: Any = zoo.load(checkpoint, image_tower=TOWER)
    with pytest.raises(ValueError, match=r"has other weights, model\.safetensors"):
        zoo.save(model, checkpoint, max_shard_bytes=50_000)
    with pytest.raises(ValueError, match="must be a LlavaForConditionalGeneration, got MoELayer"):
        zoo.save(next(iter(moe_layers(model).values())), tmp_path / "out")
    model.config.moe = {**model.config.moe, "num_experts": [4, 8]}
    with pytest.raises(ValueError, match=r"slots \{0: 4, 2: 8\} by layer, and the model has \{0: 4, 2: 4\}"):
        zoo.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
