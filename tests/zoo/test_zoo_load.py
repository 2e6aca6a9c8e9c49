"""`zoo.load`: what a checkpoint computes, in every form of its files, and what loading costs."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import tiny_zoo
import torch
from tiny_zoo import IMAGE, MASKS, MIXTURES, PATCHES, TOWER, D, V, reference, tensors_of, write
from torch import Tensor

from dynmoe_tutel import zoo
from dynmoe_tutel.metrics import moe_layers

ROOT = Path(__file__).resolve().parents[2]


def inputs(image: bool, batch: int = 2, length: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, V - 1, (batch, length), generator=generator)
    if not image:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    patches = torch.full((batch, PATCHES), V - 1)
    ids = torch.cat([ids[:, :3], patches, ids[:, 3:]], dim=1)
    pixels = torch.randn(batch, 3, IMAGE, IMAGE, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def ks_of(model: Any, given: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the k of each token by layer."""
    seen: list[Tensor] = []
    hooks = [
        layer.gates[0].register_forward_hook(lambda _, __, routing: seen.append(routing.k_per_token.clone()))
        for layer in moe_layers(model).values()
    ]
    with torch.no_grad():
        logits = model(**given).logits
    for hook in hooks:
        hook.remove()
    return logits, seen


@pytest.mark.parametrize("experts", ["grouped", "modules"])
def test_logits_k_and_greedy_tokens_are_those_of_loops_over_experts(
    family: str, checkpoint: Path, experts: str
) -> None:
    expected, model = reference(family, tensors_of(family)), zoo.load(checkpoint, image_tower=TOWER, experts=experts)
    assert not model.training
    for image in (False, True):
        given = inputs(image)
        with torch.no_grad():
            wanted = expected(**given).logits
        logits, ks = ks_of(model, given)
        assert (logits - wanted).abs().max() < 1e-5 < wanted.abs().max()
        loops = [expected.model.language_model.layers[i].mlp for i in MIXTURES]
        for k, loop in zip(ks, loops, strict=True):
            assert torch.equal(k.flatten().long(), loop.k)
        assert len(set(ks[1].tolist())) > 1
        one = {key: value[:1] for key, value in given.items()}
        new = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(model.generate(**one, **new), expected.generate(**one, **new))


def test_masks_and_counts_are_the_files(family: str, checkpoint: Path) -> None:
    model = zoo.load(checkpoint, image_tower=TOWER)
    for i, layer in zip(MIXTURES, moe_layers(model).values(), strict=True):
        assert layer.gates[0].experts_mask.tolist() == list(MASKS[i])
        assert layer.num_global_experts == sum(MASKS[i])
        assert layer.max_num_global_experts == len(MASKS[i])
        assert int(layer.dropped_assignments) == 0


@pytest.mark.parametrize("form", ["shards", "bin"])
def test_every_form_of_files_gives_the_same_model(family: str, checkpoint: Path, form: str, tmp_path: Path) -> None:
    write(tmp_path, family, form=form)
    one, other = zoo.load(checkpoint, image_tower=TOWER), zoo.load(tmp_path, image_tower=TOWER)
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_dtype_is_the_files_unless_given(family: str, tmp_path: Path) -> None:
    tensors = write(tmp_path, family, torch.bfloat16)
    model = zoo.load(tmp_path, image_tower=TOWER)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    layers = moe_layers(model).values()
    assert {layer.gates[0].experts_mask.dtype for layer in layers} == {torch.float32}
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    wide = zoo.load(tmp_path, dtype=torch.float32, image_tower=TOWER)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert torch.equal(wide.lm_head.weight, tensors["lm_head.weight"].float())
    logits, half = wide(**inputs(True)).logits, model(**inputs(True)).logits
    assert (logits - half).norm() < 0.05 * logits.norm()


def test_left_padding_changes_nothing_and_reaches_no_expert(family: str, checkpoint: Path) -> None:
    model, given = zoo.load(checkpoint, image_tower=TOWER), inputs(True)
    logits, ks = ks_of(model, given)
    pad = torch.full((2, 3), 5)
    padded = {
        "input_ids": torch.cat([pad, given["input_ids"]], dim=1),
        "attention_mask": torch.cat([torch.zeros_like(pad), given["attention_mask"]], dim=1),
        "pixel_values": given["pixel_values"],
    }
    positions = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    shifted, padded_ks = ks_of(model, {**padded, "position_ids": positions})
    assert (shifted[:, 3:] - logits).abs().max() < 1e-5
    for k, padded_k in zip(ks, padded_ks, strict=True):
        padded_k = padded_k.view(2, -1)
        assert not padded_k[:, :3].any()
        assert torch.equal(padded_k[:, 3:], k.view(2, -1))
    new = {"max_new_tokens": 6, "do_sample": False}
    plain, after = model.generate(**given, **new), model.generate(**padded, **new)
    assert torch.equal(after[:, 3:], plain)


def test_a_device_map_places_the_model(checkpoint: Path, family: str) -> None:
    if family != "phi":
        pytest.skip("one family will do")
    model = zoo.load(checkpoint, device="meta", image_tower=TOWER)
    assert {p.device.type for p in model.parameters()} == {"meta"}


LOAD_AND_MEASURE = """
    import ctypes, gc, sys, threading, time
    from pathlib import Path
    from dynmoe_tutel import zoo

    folder, tower = Path(sys.argv[1]), eval(sys.argv[2])

    def held():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    zoo.load(folder / "tiny", image_tower=tower)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, peak, done = held(), [0], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], held())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = zoo.load(folder / "large", image_tower=tower)
    done.set()
    watcher.join()
    print(peak[0] - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.slow
def test_loading_takes_little_more_memory_than_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak of memory that is not the file's own pages, in a process that has loaded a tiny model before.

    Weights that are no experts' stay pages of the file.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("this system has no /proc to read memory from")
    write(tmp_path / "tiny", "qwen")
    # as many layers as that the experts of one are few beside the file
    sizes = {"hidden_size": 256, "num_hidden_layers": 12}
    for name, value in {"D": 256, "LAYERS": 12, "MIXTURES": range(0, 12, 2), "I": {"qwen": 768}}.items():
        monkeypatch.setattr(tiny_zoo, name, value)
    moe = {"top_k_experts": -1, "num_experts": [4]}
    write(tmp_path / "large", "qwen", torch.bfloat16, kv_channels=64, moe=moe, **sizes)
    command = [sys.executable, "-c", textwrap.dedent(LOAD_AND_MEASURE), str(tmp_path), repr(TOWER)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    peak, weights = (int(word) for word in done.stdout.split()[-2:])
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert size > 30e6
    assert 0.5 * weights < peak < 1.3 * size, f"{peak / size:.2f} of the file"


def test_sizes_are_as_tiny_as_said() -> None:
    assert sum(t.numel() for t in tensors_of("qwen").values()) < 150_000
    assert D < 64
