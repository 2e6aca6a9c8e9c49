"""`convert` on tricky hosts: foreign masks, shared modules, dropouts out of order, labels in place of a mask."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_rms
from torch import Tensor, nn

from dynmoe_tutel.convert import aux_loss, convert, revert
from dynmoe_tutel.layer import MoELayer

transformers = pytest.importorskip("transformers")

EXACT = 1e-6  # relative RMS of one fp32 model against another


class FFN(nn.Module):
    def __init__(self, D: int = 8, H: int = 16) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class LanguageModel(nn.Module):
    """Two FFNs over an embedding, with a loss on targets: the second argument is no mask."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        first = FFN()
        self.blocks = nn.ModuleList([first, first if shared else FFN()])

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.embed(idx)
        for block in self.blocks:
            x = x + block(x)
        return x if targets is None else F.cross_entropy((x @ self.embed.weight.t()).flatten(0, 1), targets.flatten())


def moe_layers(model: nn.Module) -> list[MoELayer]:
    return [m for m in model.modules() if isinstance(m, MoELayer)]


def tokens_seen(model: nn.Module, *args: Any, **kwargs: Any) -> list[int]:
    """Token count in each layer's record of one training forward."""
    model.train()
    for layer in moe_layers(model):
        layer.begin_record_routing()
    model(*args, **kwargs)
    seen = [int(layer.record.tokens) for layer in moe_layers(model)]
    for layer in moe_layers(model):
        layer.end_record_routing()
    return seen


def ids(B: int, L: int, high: int = 11) -> Tensor:
    return torch.randint(high, (B, L), generator=torch.Generator().manual_seed(0))


def seeded(make: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def tiny_bert(**options: Any) -> Any:
    config = transformers.BertConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **options,
    )
    return seeded(lambda: transformers.BertForSequenceClassification(config))


def tiny_t5() -> Any:
    config = transformers.T5Config(
        vocab_size=11,
        d_model=8,
        d_kv=4,
        d_ff=16,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.25,
        decoder_start_token_id=0,
    )
    return seeded(lambda: transformers.T5ForConditionalGeneration(config))


# Masks


def test_targets_in_second_place_are_no_mask() -> None:
    """`model(idx, targets)` as in nanoGPT: tokens whose target is class 0 still count."""
    model = convert(seeded(LanguageModel), layers="all", num_experts=4)
    targets = torch.zeros(2, 5, dtype=torch.long)
    assert tokens_seen(model, ids(2, 5), targets) == [10, 10]


def test_a_mask_reaches_layers_under_each_way_of_giving_it() -> None:
    model = convert(tiny_bert(), layers="all", num_experts=4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert tokens_seen(model, ids(2, 5), attention_mask=mask) == [8, 8]
    assert tokens_seen(model, ids(2, 5), mask) == [8, 8]
    assert tokens_seen(model.bert, ids(2, 5), mask) == [8, 8]
    assert tokens_seen(model, ids(2, 5)) == [10, 10]  # the last mask is forgotten
    embedded = model.bert.embeddings.word_embeddings(ids(2, 5))
    assert tokens_seen(model, inputs_embeds=embedded, attention_mask=mask) == [8, 8]


def test_a_mask_can_be_left_out() -> None:
    model = convert(tiny_bert(), layers="all", num_experts=4, mask_padding=False)
    assert tokens_seen(model, ids(1, 5), attention_mask=torch.tensor([[1, 1, 0, 0, 0]])) == [5, 5]


def test_a_mask_is_not_used_after_its_forward() -> None:
    model = convert(tiny_bert(), layers="all", num_experts=4)
    model(ids(1, 5), attention_mask=torch.tensor([[1, 1, 0, 0, 0]]))
    assert tokens_seen(model.bert.encoder, torch.randn(1, 5, 8)) == [5, 5]


def test_padding_does_not_change_the_loss() -> None:
    """Losses of batches padded to 5 and to 7 are equal, with and without gradient checkpointing."""
    losses = []
    for width, checkpointing in ((5, False), (7, False), (7, True)):
        model = convert(tiny_bert(), layers="all", num_experts=4, is_gshard_loss=True, seeds=(0, 0)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        tokens, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
        tokens[:, :5], mask[:, :5] = ids(2, 5), 1
        loss = model(tokens, attention_mask=mask).logits.square().sum() + aux_loss(model)
        loss.backward()
        losses.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    for loss, gradients in losses[1:]:
        assert relative_rms(loss, losses[0][0]) < EXACT
        assert gradients.keys() == losses[0][1].keys()
        for name, gradient in gradients.items():
            assert relative_rms(gradient, losses[0][1][name], scale=1e-3) < 1e-4, name


def test_a_decoder_has_its_own_mask() -> None:
    """T5: the encoder's mask does not apply to the decoder's tokens, even if both have the same length."""
    model = convert(tiny_t5(), layers="all", num_experts=4)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    for L in (3, 5):
        assert tokens_seen(model, ids(2, 5), attention_mask=mask, decoder_input_ids=ids(2, L)) == [7, 7, 2 * L, 2 * L]
    own = torch.tensor([[1, 0, 0], [1, 1, 1]])
    seen = tokens_seen(model, ids(2, 5), mask, decoder_input_ids=ids(2, 3), decoder_attention_mask=own)
    assert seen == [7, 7, 4, 4]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("make", [tiny_bert, tiny_t5])
def test_two_forwards_before_a_backward_under_checkpointing(make: Any, reentrant: bool) -> None:
    """Pairs of sentences (SimCSE, DPO): each recompute has the mask of its own forward, and the same dropout."""
    masks = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]), torch.tensor([[1, 1, 1, 1, 0], [1, 0, 0, 0, 0]])
    decoder = {"decoder_input_ids": ids(2, 5)} if make is tiny_t5 else {}
    found = []
    for checkpointing in (False, True):
        model = convert(make(), layers="all", num_experts=4, seeds=(0, 0)).train()
        with torch.no_grad():
            for layer in moe_layers(model):
                layer.experts.batched_fc2_w.mul_(torch.arange(1.0, 5).view(4, 1, 1))  # no expert is as another
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(1)
        a, b = (model(ids(2, 5), attention_mask=mask, **decoder).logits for mask in masks)
        (a * b).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert relative_rms(found[1][name], gradient, scale=1e-3) < 1e-5, name


def test_generation_with_a_cache_and_left_padding_is_the_dense_models() -> None:
    config = transformers.GPT2Config(vocab_size=23, n_positions=32, n_embd=8, n_layer=2, n_head=2, pad_token_id=0)
    model = seeded(lambda: transformers.GPT2LMHeadModel(config))
    prompt, mask = ids(2, 4, 23), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(prompt, attention_mask=mask, **options)
    convert(model, layers="all", num_experts=4)
    found = model.generate(prompt, attention_mask=mask, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert relative_rms(torch.stack(found.logits), torch.stack(expected.logits)) < EXACT
    rows: list[int] = []

    def count(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        rows.append(int(kwargs["token_mask"].sum()))

    moe_layers(model)[0].register_forward_pre_hook(count, with_kwargs=True)
    model.generate(prompt, attention_mask=mask, **options)
    assert rows == [6] + [2] * 7


# Dropouts, shared modules, copies


def test_dropouts_keep_their_places_whatever_the_order_of_the_children() -> None:
    """T5's inner dropout is its last child; DistilBERT's final dropout is its first."""
    t5 = convert(tiny_t5(), layers=[0], num_experts=4)
    assert type(t5.encoder.block[0].layer[1].DenseReluDense) is MoELayer
    assert moe_layers(t5)[0].experts.activation_fn.p == 0.25
    config = transformers.DistilBertConfig(vocab_size=11, dim=8, hidden_dim=16, n_layers=2, n_heads=2, dropout=0.25)
    bert = convert(seeded(lambda: transformers.DistilBertModel(config)), layers=[0], num_experts=4)
    assert moe_layers(bert)[0].experts.activation == "gelu"
    assert bert.transformer.layer[0].ffn.dropout.p == 0.25


def test_t5_and_distilbert_are_equal_and_revert() -> None:
    config = transformers.DistilBertConfig(vocab_size=11, dim=8, hidden_dim=16, n_layers=2, n_heads=2)
    bert = seeded(lambda: transformers.DistilBertModel(config))
    for model, inputs in ((bert, (ids(2, 5),)), (tiny_t5(), (ids(2, 5), None, ids(2, 3)))):
        expected, before = model(*inputs)[0], copy.deepcopy(model.state_dict())
        convert(model, layers="all", num_experts=4)
        assert relative_rms(model(*inputs)[0], expected) < EXACT
        revert(model)
        assert torch.equal(model(*inputs)[0], expected)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_ffn_in_two_places_stays_one() -> None:
    model = seeded(lambda: LanguageModel(shared=True))
    expected, before = model(ids(2, 5)), copy.deepcopy(model.state_dict())
    convert(model, layers="all", num_experts=4)
    assert model.blocks[0] is model.blocks[1]
    assert len(moe_layers(model)) == 1
    assert relative_rms(model(ids(2, 5)), expected) < EXACT
    revert(model)
    assert model.blocks[0] is model.blocks[1]
    assert torch.equal(model(ids(2, 5)), expected)
    assert model.state_dict().keys() == before.keys()


def test_an_outer_model_reverts_what_was_converted_inside() -> None:
    model = tiny_bert()
    expected = model(ids(2, 5)).logits
    convert(model.bert.encoder, layers="all", num_experts=4)
    revert(model)
    assert torch.equal(model(ids(2, 5)).logits, expected)
    convert(model, layers="all", num_experts=4)
    revert(model.bert)
    assert torch.equal(model(ids(2, 5)).logits, expected)


def test_ffns_of_tied_weights_each_get_their_experts() -> None:
    model = seeded(LanguageModel)
    model.blocks[1].up.weight = model.blocks[0].up.weight
    expected = model(ids(2, 5))
    convert(model, layers=[1], num_experts=4)
    assert not model.blocks[0].up.weight.is_meta
    assert relative_rms(model(ids(2, 5)), expected) < EXACT


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies_compute_mask_and_revert_as_the_original(copied: str) -> None:
    model = tiny_bert()
    expected = model(ids(2, 5)).logits
    convert(model, layers="all", num_experts=4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    model(ids(2, 5), attention_mask=mask)
    if copied == "deepcopy":
        other = copy.deepcopy(model)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif copied == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = convert(tiny_bert(), layers="all", num_experts=4)
        other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids(2, 5)).logits, model(ids(2, 5)).logits)
    assert tokens_seen(other, ids(2, 5), attention_mask=mask) == [8, 8]
    revert(other)
    assert torch.equal(other.eval()(ids(2, 5)).logits, expected)
    assert len(moe_layers(model)) == 2  # the original is as it was


def test_another_dtype_after_conversion_reverts_in_it() -> None:
    model = convert(tiny_bert(), layers="all", num_experts=4).to(torch.bfloat16)
    assert {p.dtype for p in revert(model).parameters()} == {torch.bfloat16}
    expected = tiny_bert().to(torch.bfloat16).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [0, 7]}, r"FFN 7 of 2: give 0 to 1"),
        ({"layers": [0, "bert.encoder.layer.0"]}, "twice"),
        ({"layers": ["bert.pooler"]}, r"'bert\.pooler' is a BertPooler with .*dense \[8, 8\]"),
        ({"layers": []}, "at least one"),
        ({"recipe": "moefication"}, "recipe = 'moefication'.*'gmoe', 'emoe'"),
        ({"recipe": "emoe", "num_experts": 3, "layers": [0, 1]}, "16 neurons.*3 slots"),
        ({"recipe": "emoe", "split": "spectral"}, "split = 'spectral'"),
        ({"number_of_experts": 4}, "number_of_experts"),
        ({"experts": {"hidden": 3}}, "hidden"),
        ({"moe_dropout": 1.5}, "moe_dropout"),
    ],
)
def test_refused_options_leave_the_model_as_it_was(options: dict[str, Any], message: str) -> None:
    model = tiny_bert().train()
    model.bert.encoder.eval()
    modes = [(n, m.training) for n, m in model.named_modules()]
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        convert(model, **{"gate_type": {"type": "top_any"}, "layers": "all", **options})
    assert [(n, m.training) for n, m in model.named_modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_second_conversion_takes_only_what_is_left() -> None:
    model = tiny_bert()
    expected = model(ids(2, 5)).logits
    convert(model, layers=[0], num_experts=4)
    convert(model, layers=[0], num_experts=4)  # of the FFNs that are left
    assert len(moe_layers(model)) == 2
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert tokens_seen(model, ids(2, 5), attention_mask=mask) == [8, 8]
    assert relative_rms(model.eval()(ids(2, 5)).logits, expected) < EXACT
    with pytest.raises(ValueError, match="no FFN"):
        convert(model)
    assert torch.equal(revert(model)(ids(2, 5)).logits, expected)
