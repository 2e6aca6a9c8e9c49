"""The control of a budget's target: mean k in training, in every window, whatever the start; and its parts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynmoe_tutel import ExpertController, MoELayer
from dynmoe_tutel.adaptive import budget
from dynmoe_tutel.adaptive.budget import Budgets, _part, kept_margins, shift_for
from dynmoe_tutel.gates.budget import Budget
from dynmoe_tutel.gates.samples import sampled_rows
from dynmoe_tutel.gates.top_any import SAMPLE

INF = torch.inf
D, E = 32, 16


def make_layer(budget: dict[str, Any], threshold: float = 0.0, **options: Any) -> MoELayer:
    gate_type = {"type": "top_any", "max_expert_num": E, "budget": budget}
    experts = {"num_experts_per_device": 12, "hidden_size_per_expert": 8}
    layer = MoELayer(gate_type, D, experts, seeds=(1, 2), **options)
    with torch.no_grad():
        layer.gates[0].gates.fill_(threshold)
    return layer


class Task:
    """Tokens around a few centres, and a linear map to learn."""

    def __init__(self, tokens: int = 256, dtype: torch.dtype = torch.float32) -> None:
        self.generator, self.tokens, self.dtype = torch.Generator().manual_seed(0), tokens, dtype
        self.centres = torch.randn(6, D, generator=self.generator)
        self.map_DD = torch.randn(D, D, generator=self.generator) / D**0.5

    def batch(self) -> Tensor:
        chosen = torch.randint(6, (self.tokens,), generator=self.generator)
        x = self.centres[chosen] + torch.randn(self.tokens, D, generator=self.generator)
        return x.to(self.dtype)

    def train(self, model: Any, layers: list[MoELayer], steps: int) -> tuple[list[float], ExpertController]:
        """Mean k over the layers in each step, in a training that grows and prunes experts every 50 steps."""
        k: list[float] = []
        hooks = [
            layer.gates[0].register_forward_hook(lambda *args: k.append(float(args[2].k_per_token.float().mean())))
            for layer in layers
        ]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        controller = ExpertController(model, optimizer, schedule=50)
        for _ in range(steps):
            x = self.batch()
            optimizer.zero_grad()
            error = model(x).float() - x.float() @ self.map_DD
            (error.square().mean() + 0.01 * sum(layer.l_aux for layer in layers)).backward()
            optimizer.step()
            controller.step()
        for hook in hooks:
            hook.remove()
        return torch.tensor(k).view(steps, len(layers)).mean(dim=1).tolist(), controller


def worst_window(means: list[float], target: float, size: int = 100, after: int = 200) -> float:
    """The largest relative error of the mean over `size` steps, of all such windows after the first steps."""
    windows = torch.tensor(means[after:]).unfold(0, size, 1).mean(dim=1)
    return float((windows / target - 1).abs().max())


@pytest.mark.parametrize(("threshold", "start"), [(-0.3, 8.0), (0.35, 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mean_k_is_the_target_in_every_window(dtype: torch.dtype, threshold: float, start: float) -> None:
    """While experts grow and are pruned, from a mean far above and far below; and on tokens never seen."""
    layer, task = make_layer({"target_k": 2.0}, threshold).to(dtype), Task(dtype=dtype)
    means, controller = task.train(layer, [layer], 400)
    assert means[0] > 0.8 * start if start > 2 else means[0] < 1.2 * start
    assert worst_window(means, 2.0) < 0.05
    assert controller.events or start > 2
    held_out = layer.eval().route(task.batch()).k_per_token.float().mean()
    assert abs(float(held_out) / 2 - 1) < 0.1


def test_a_model_shares_one_mean() -> None:
    """Scope "model": one shift, the mean over both layers on target, though each layer alone is far from it."""
    layers = [make_layer({"target_k": 2.0, "scope": "model"}, threshold) for threshold in (0.2, -0.2)]
    means, _ = (task := Task()).train(torch.nn.Sequential(*layers), layers, 400)
    assert worst_window(means, 2.0) < 0.05
    assert layers[0].gates[0].budget_shift.tolist() == layers[1].gates[0].budget_shift.tolist()
    x = task.batch()
    first, second = (float(m.route(x).k_per_token.float().mean()) for m in layers)
    assert abs(first - second) > 0.3


def test_targets_of_one_model_must_agree() -> None:
    layers = [make_layer({"target_k": k, "scope": "model"}) for k in (2.0, 3.0)]
    with pytest.raises(ValueError, match=r"scope 'model': layers have target_k \[2.0, 3.0\]"):
        Budgets(torch.nn.Sequential(*layers))


class TestLayersOfLater:
    """What changes after the first step is noticed: targets at once, layers within LOOK_EVERY steps."""

    def test_a_target_that_changes(self) -> None:
        layers = torch.nn.Sequential(*[make_layer({"target_k": 2.0, "scope": "model"}) for _ in range(2)])
        budgets = Budgets(layers)
        budgets.step()
        layers[1].gates[0].hold_budget(Budget(3.0, scope="model"))
        with pytest.raises(ValueError, match=r"scope 'model': layers have target_k \[2.0, 3.0\]"):
            budgets.step()

    def test_a_gate_that_is_replaced(self) -> None:
        layer, other = make_layer({"target_k": 2.0}), make_layer({"target_k": 2.0})
        budgets = Budgets(layer)
        layer.gates[0] = other.gates[0]
        layer(torch.randn(64, D))
        budgets.step()
        assert float(other.gates[0].budget_shift) != 0

    def test_a_layer_that_is_added(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(budget, "LOOK_EVERY", 3)
        model = torch.nn.Sequential(make_layer({"target_k": 2.0, "scope": "model"}))
        budgets = Budgets(model)
        model.append(make_layer({"target_k": 2.0, "scope": "model"}))
        shifts = []
        for _ in range(6):
            model(torch.randn(64, D))
            budgets.step()
            shifts.append([float(layer.gates[0].budget_shift) for layer in model])
        assert [second != 0 for _, second in shifts] == [False, False, True, True, True, True]
        model.append(make_layer({"target_k": 3.0, "scope": "model"}))
        budgets.step()
        budgets.step()
        with pytest.raises(ValueError, match=r"scope 'model': layers have target_k \[2.0, 3.0\]"):
            budgets.step()


def test_growth_means_what_it_meant() -> None:
    """Tokens pushed below raised thresholds are not unrouted: the record has those that pass no threshold, no other."""
    layer = make_layer({"target_k": 1.0}, -0.1)
    layer.gates[0].budget_shift.fill_(1.0)
    x = torch.randn(200, D, generator=torch.Generator().manual_seed(0))
    layer.begin_record_routing()
    layer(x)
    plain = make_layer({"max_k": 16}, -0.1)
    assert int(layer.record.unrouted_tokens) == int(plain.route(x).unrouted.sum())
    assert int(layer.record.counts.sum()) == 200 - int(layer.record.unrouted_tokens)


def test_a_resumed_training_is_bitwise_the_whole_one() -> None:
    def steps(layer: MoELayer, optimizer: Any, controller: Any, batches: list[Tensor]) -> None:
        for x in batches:
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
            controller.step()

    def start() -> tuple[MoELayer, Any, Any]:
        layer = make_layer({"target_k": 2.0, "max_k": 4})
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
        return layer, optimizer, ExpertController(layer, optimizer, schedule=5)

    task = Task()
    batches = [task.batch() for _ in range(14)]
    whole, resumed = start(), start()
    steps(*whole, batches)
    first = start()
    steps(*first, batches[:7])
    for part, saved in zip(resumed, first, strict=True):
        part.load_state_dict(copy.deepcopy(saved.state_dict()))
    steps(*resumed, batches[7:])
    for (name, value), other in zip(whole[0].state_dict().items(), resumed[0].state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    assert float(whole[0].gates[0].budget_shift) != 0


def test_only_training_forwards_move_the_shift() -> None:
    layer = make_layer({"target_k": 2.0})
    budgets = Budgets(layer)
    layer.eval()(torch.randn(64, D))
    budgets.step()
    assert layer.gates[0].budget_shift.tolist() == [0.0]
    layer.train()(torch.randn(64, D))
    budgets.step()
    assert layer.gates[0].budget_shift.tolist() != [0.0]


def test_padding_is_not_counted() -> None:
    x, mask = torch.randn(300, D), torch.arange(300) % 3 > 0
    shifts = []
    for tokens, token_mask in (
        (x[mask], None),
        (x[mask][:1].expand(300, D).clone().masked_scatter(mask.unsqueeze(1), x[mask]), mask),
    ):
        layer = make_layer({"target_k": 2.0})
        layer(tokens, token_mask=token_mask)
        Budgets(layer).step()
        shifts.append(float(layer.gates[0].budget_shift))
    assert shifts[0] == pytest.approx(shifts[1], abs=0.02)
    assert shifts[0] != 0


def test_the_sample_is_spread_over_the_batch_and_bounded() -> None:
    layer = make_layer({"target_k": 2.0})
    x = torch.randn(1000, D, generator=torch.Generator().manual_seed(0))
    layer(x)
    kept = layer.gates[0]._sample[layer.gates[0]._sampled]
    chosen = x[sampled_rows(1000, SAMPLE, x.device)]
    assert torch.allclose(kept, torch.nn.functional.normalize(chosen, dim=1))


@pytest.mark.parametrize(("sequences", "length"), [(80, 9), (128, 16), (256, 128)])
def test_tokens_that_differ_by_their_place_in_a_sequence(sequences: int, length: int) -> None:
    """A sample of their first tokens alone would hold the target for those, and a mean of 1.2 for all."""
    layer, generator = make_layer({"target_k": 2.0}), torch.Generator().manual_seed(0)
    place, budgets, k = 3 * torch.randn(length, D, generator=generator), Budgets(layer), []
    for _ in range(40):
        x = place + torch.randn(sequences, length, D, generator=generator)
        layer(x)
        budgets.step()
        k.append(float(layer.route(x).k_per_token.float().mean()))
    assert sum(k[-20:]) / 20 == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("ranks", [2, 8])
def test_a_rank_sends_tokens_of_every_place(ranks: int) -> None:
    """Of a sample whose rows are in step with the ranks, not those of one residue alone."""
    margins = (torch.arange(SAMPLE) % ranks).float().unsqueeze(1)
    part = _part(margins, ranks)
    assert part.shape == (SAMPLE // ranks, 1)
    assert (torch.bincount(part.flatten().long(), minlength=ranks) >= SAMPLE // ranks**2 - 2).all()


class TestParts:
    def test_kept_margins(self) -> None:
        """By hand: the best own expert stays at any shift; a cap cuts the rest; a lost token has no entry of +inf."""
        margins = torch.tensor([[0.1, 0.3, -0.2], [-0.4, -0.1, -INF], [-INF, -INF, -INF]])
        expected = torch.tensor([[0.1, INF, -0.2], [-0.4, -0.1, -INF], [-INF, -INF, -INF]])
        assert torch.equal(kept_margins(margins, None), expected)
        expected = torch.tensor([[-INF, INF, -INF], [-INF, -0.1, -INF], [-INF, -INF, -INF]])
        assert torch.equal(kept_margins(margins, 1), expected)

    @pytest.mark.parametrize(("target", "shift"), [(1.0, 2.0), (1.5, 0.3), (2.0, 0.05), (2.5, -0.15), (3.0, -2.0)])
    def test_shift_for(self, target: float, shift: float) -> None:
        """By hand: midway between what stays and what goes; the ends where only best experts stay, or all."""
        margins = torch.tensor([[INF, 0.4, -0.1], [INF, 0.2, -0.2]])
        assert float(shift_for(margins, torch.tensor(2), target)) == pytest.approx(shift)


class Wrapped(nn.Module):
    """What a tool puts in the place of a gate."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.inner(*arguments, **options)


def test_a_wrapped_gate_holds_its_target() -> None:
    layer = make_layer({"target_k": 2.0})
    gate = layer.gates[0]
    layer.gates[0] = Wrapped(gate)
    k, _ = Task().train(layer, [layer], 60)
    assert sum(k[-20:]) / 20 == pytest.approx(2.0, rel=0.1)
    assert gate.budget_shift > 0
