"""The stand-in for Tutel: its content, its traceless installation and removal, and collectives over two processes."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import PATIENCE, spawn_ranks
from torch import Tensor

from dynmoe_tutel import gates, layer, moe, tutel_stand_in
from dynmoe_tutel.adaptive import Budgets
from dynmoe_tutel.tutel_stand_in import layer as stand_in_layer
from dynmoe_tutel.tutel_stand_in import modules, net, sharding, system

if tutel_stand_in.tutel_is_importable():
    pytest.skip("Tutel is installed, and its stand-in refuses to hide it", allow_module_level=True)

MODULES = ["tutel", "tutel.moe", "tutel.impls", "tutel.impls.moe_layer", "tutel.impls.fast_dispatch", "tutel.gates",
           "tutel.gates.top", "tutel.gates.cosine_top", "tutel.gates.top_any", "tutel.gates.gated_multi_gate",
           "tutel.gates.gated_multi_gate_t", "tutel.experts", "tutel.experts.ffn", "tutel.jit_kernels.gating",
           "tutel.system", "tutel.net"]  # fmt: skip


def ours() -> set[str]:
    return {name for name in sys.modules if name.split(".")[0] == "tutel"}


@pytest.fixture
def surface() -> Iterator[None]:
    tutel_stand_in.install()
    yield
    tutel_stand_in.remove()
    assert not ours()


@pytest.fixture
def single(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that names no rank."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def layer_of(kind: str, max_expert_num: int = 4) -> Any:
    """A layer built as in upstream's scripts."""
    from tutel import moe as tutel_moe

    return tutel_moe.moe_layer(
        gate_type={"type": kind, "max_expert_num": max_expert_num, "fp32_gate": True, "adaptive_experts": True},
        experts={"type": "ffn", "count_per_node": 2, "hidden_size_per_expert": 8, "activation_fn": torch.nn.GELU()},
        model_dim=8,
        batch_prioritized_routing=True,
        is_gshard_loss=False,
        one_score_gate=False,
        normalize_one_score_gate=False,
        update_momentum=0.0,
    )


def test_install_and_remove_are_idempotent_and_leave_nothing() -> None:
    finders = list(sys.meta_path)
    tutel_stand_in.remove()
    tutel_stand_in.install()
    first = sys.modules["tutel"]
    tutel_stand_in.install()
    assert sys.modules["tutel"] is first
    assert tutel_stand_in.installed()
    assert not tutel_stand_in.tutel_is_importable()
    assert set(MODULES) <= ours()
    for _ in range(2):
        tutel_stand_in.remove()
        assert not ours()
        assert sys.meta_path == finders
        assert not tutel_stand_in.installed()


@pytest.mark.usefixtures("surface")
def test_every_module_is_imported_found_and_reached_from_its_parent() -> None:
    root = importlib.import_module("tutel")
    for name in MODULES:
        module = importlib.import_module(name)
        assert (module.__name__, importlib.util.find_spec(name).name) == (name, name)
        found = root
        for part in name.split(".")[1:]:
            found = getattr(found, part)
        assert found is module


@pytest.mark.usefixtures("surface")
def test_names_are_this_packages_own() -> None:
    import tutel.experts.ffn
    import tutel.gates.cosine_top
    import tutel.gates.gated_multi_gate_t
    import tutel.gates.top
    import tutel.impls.fast_dispatch
    import tutel.impls.moe_layer
    import tutel.jit_kernels.gating
    import tutel.moe
    from tutel import system_init

    assert tutel.impls.moe_layer.MOELayer is tutel.impls.moe_layer.moe_layer is tutel.moe.moe_layer
    assert tutel.moe.moe_layer is stand_in_layer.MOELayer
    assert issubclass(tutel.moe.moe_layer, layer.MoELayer)
    assert isinstance(moe.moe_layer("top_any", 8, {"hidden_size_per_expert": 4}), tutel.impls.moe_layer.MOELayer)
    assert isinstance(layer.MoELayer("top_any", 8, {"hidden_size_per_expert": 4}), tutel.impls.moe_layer.MOELayer)
    assert tutel.gates.top.Gate is tutel.gates.top.LinearTopKGate is modules.LinearTopKGate
    assert tutel.gates.cosine_top.Gate is tutel.gates.cosine_top.CosineTopKGate is modules.CosineTopKGate
    assert tutel.experts.ffn.ExpertModule is tutel.experts.ffn.FusedExpertsNetwork is modules.FusedExpertsNetwork
    assert tutel.jit_kernels.gating.fast_cumsum_sub_one is moe.fast_cumsum_sub_one
    assert tutel.gates.gated_multi_gate_t.Gate is gates.TopAnyGate
    assert tutel.impls.fast_dispatch.fast_encode is moe.fast_encode
    assert system_init is tutel.system
    for name in set(moe.__all__) - set(stand_in_layer.__all__):
        assert getattr(tutel.moe, name) is getattr(moe, name)
    for module, source in (("moe", moe), ("net", net), ("net", sharding), ("system", system)):
        scope: dict[str, Any] = {}
        exec(f"from tutel.{module} import *", scope)
        assert set(source.__all__) <= scope.keys()


@pytest.mark.usefixtures("surface")
def test_a_patch_of_the_stand_in_is_not_one_of_this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import tutel.moe

    monkeypatch.setattr(tutel.moe, "moe_layer", None)
    assert tutel.moe.moe_layer is None
    assert issubclass(moe.moe_layer, layer.MoELayer)


@pytest.mark.usefixtures("surface")
@pytest.mark.parametrize(
    ("statement", "error", "name"),
    [
        ("import tutel.net; tutel.net.AllToAllStatus", AttributeError, "tutel.net.AllToAllStatus"),
        ("from tutel.impls.communicate import swap_axis", ImportError, "tutel.impls.communicate.swap_axis"),
        ("import tutel.jit", ImportError, "tutel.jit"),
        ("from tutel import jit", ImportError, "tutel.jit"),
        ("from tutel.impls import overlap", ImportError, "tutel.impls.overlap"),
        ("import tutel; tutel.examples", AttributeError, "tutel.examples"),
    ],
)
def test_what_is_not_provided_is_refused_with_the_reason(statement: str, error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=rf"^{name} needs Tutel itself.*https://github.com/microsoft/Tutel"):
        exec(statement, {})
    assert not hasattr(sys.modules["tutel"], "examples")


@pytest.mark.usefixtures("surface")
@pytest.mark.parametrize("kind", ["gated_multi_gate", "gated_multi_gate_t"])
def test_an_upstream_layer_records_and_adapts(kind: str) -> None:
    import tutel.impls.moe_layer as moe_layer

    torch.manual_seed(0)
    block = layer_of(kind)
    assert isinstance(block, moe_layer.MOELayer)
    assert block.max_num_local_experts == 4
    block.begin_record_routing()
    opposite_D = -block.gates[0].sim_matrix.detach()[:, :2].sum(dim=1)  # to both experts: no token is routed
    y = block(opposite_D.expand(2, 3, 8))
    assert y.l_aux is block.l_aux
    assert block.get_routing_records().tolist() == [0, 0, 0, 0]
    block.adaptive_update_experts()
    active = block.gates[0].experts_mask.nonzero().flatten()
    assert block.num_global_experts == len(active)
    grown_DE = block.gates[0].sim_matrix.detach()[:, active]
    assert (torch.nn.functional.normalize(opposite_D, dim=0) @ grown_DE).max() > 1 - 1e-6
    (block(torch.randn(2, 3, 8)).sum() + block.l_aux).backward()
    assert block.gates[0].sim_matrix.grad.isfinite().all()


@pytest.mark.usefixtures("surface")
def test_a_layer_has_a_budget() -> None:
    from tutel import moe as tutel_moe

    gate = {"type": "gated_multi_gate", "max_expert_num": 4, "budget": {"target_k": 1.5, "max_k": 2}}
    block = tutel_moe.moe_layer(gate, 8, {"type": "ffn", "count_per_node": 3, "hidden_size_per_expert": 8})
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    assert int(block.route(x).k_per_token.max()) == 2
    block(x, max_k=1)
    Budgets(block).step()
    assert float(block.gates[0].budget_shift) != 0


@pytest.mark.parametrize(
    "code", ["sys.modules['tutel'] = types.ModuleType('tutel')", "sys.path.insert(0, sys.argv[1])"]
)
def test_tutel_itself_is_never_hidden(code: str, tmp_path: Path) -> None:
    (tmp_path / "tutel").mkdir()
    (tmp_path / "tutel" / "__init__.py").write_text("")
    program = f"import sys, types\nfrom dynmoe_tutel import tutel_stand_in\n{code}\ntutel_stand_in.install()"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "RuntimeError: Tutel is installed, and its stand-in must not hide it"
    )


def test_a_folder_named_tutel_is_not_tutel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tutel").mkdir()  # as beside the experiments in DynMoE's repository
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not tutel_stand_in.tutel_is_importable()
    folder = importlib.import_module("tutel")
    try:
        assert not tutel_stand_in.tutel_is_importable()
        tutel_stand_in.install()
        assert issubclass(importlib.import_module("tutel.moe").moe_layer, layer.MoELayer)
        tutel_stand_in.remove()
        assert sys.modules["tutel"] is folder
        assert "tutel.moe" not in sys.modules
    finally:
        del sys.modules["tutel"]


@pytest.mark.usefixtures("surface", "single")
def test_a_single_process_has_an_environment_and_initialises_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    from tutel import system as tutel_system

    with pytest.raises(RuntimeError, match="init_data_model_parallel"):
        tutel_system.get_local_session()
    env = tutel_system.init_data_model_parallel(backend="gloo")
    assert not dist.is_initialized()
    assert (env.global_size, env.global_rank, env.group_count, env.data_rank) == (1, 0, 1, 0)
    assert (env.model_size, env.model_rank, env.local_device, env.is_cuda) == (1, 0, torch.device("cpu"), False)
    assert (env.data_group, env.model_group, env.global_group, env.is_distributed) == (None, None, None, False)
    assert tutel_system.get_local_session() is tutel_system.init_data_model_parallel(backend="gloo") is env
    env.dist_print("a", 1)
    assert capsys.readouterr().out == "a 1\n"
    assert tutel_system.record_time() <= tutel_system.record_time(is_cuda=False)


@pytest.mark.usefixtures("single")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "mpi"}, "backend = 'mpi': allowed are 'nccl' and 'gloo'"),
        ({"backend": "gloo", "group_count": 3}, "group_count = 3: give a divisor of the 1 ranks"),
        ({"backend": "gloo", "group_count": 0}, "group_count = 0: give a divisor"),
    ],
)
def test_bad_environments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        system.init_data_model_parallel(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nccl_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="backend = 'nccl' needs a GPU, and torch sees none: give 'gloo'"):
        system.init_data_model_parallel()


def test_files_and_cache(tmp_path: Path) -> None:
    system.init_affinity_at_program_beginning()
    path = system.apply_rank_size_from_pattern(str(tmp_path / "{size}" / "{rank}-{rank}.npy"), rank=1, size=2)
    assert path == str(tmp_path / "2" / "1-1.npy")
    x = torch.randn(2, 3, requires_grad=True)
    system.save(x, path)
    assert torch.equal(system.load(path), x.detach())
    assert not (tmp_path / "new").exists()
    system.apply_rank_size_from_pattern(str(tmp_path / "new" / "{rank}"), 0, 1, create_dir=False)
    assert not (tmp_path / "new").exists()
    cache = system.cache()
    cache.reset()
    cache.set("a", 1)
    assert (cache.get("a"), cache.get("b"), cache.get()) == (1, [1], [1])
    system.forget_session()
    assert cache.get() == []


def test_collectives_of_one_process_return_their_input() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    for function in (net.simple_all_reduce, net.simple_all_to_all, net.simple_all_gather, net.simple_reduce_scatter):
        assert function(x) is x
    assert net.all_to_all(x, 0, 1, background=True)() is x
    for y in (net.all_gather(x, 1), net.reduce_scatter(x, 1), net.allreduce_forward(x), net.all_to_all_single(x)):
        assert torch.equal(y, x)
        x.grad = None
        y.sum().backward()
        assert torch.equal(x.grad, torch.ones_like(x))


# Two processes: every collective against the same operation on the list of both ranks' tensors

SHAPE = (4, 6, 8)
WORLD = 2


def tensors(seed: int, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    """One for each rank."""
    return list(torch.randn(WORLD, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def assert_same(function: Any, expected: Any, seed: int = 0) -> None:
    """`function(x)` is `expected(all x)[rank]`, and its gradient autograd's through `expected` from all ranks' dy."""
    rank = dist.get_rank()
    all_x = [x.requires_grad_() for x in tensors(seed)]
    all_y = expected(all_x)
    all_dy = tensors(seed + 1, tuple(all_y[rank].shape))
    torch.autograd.backward(all_y, all_dy)
    x = tensors(seed)[rank].requires_grad_()
    y = function(x)
    y.backward(all_dy[rank])
    torch.testing.assert_close(y, all_y[rank])
    torch.testing.assert_close(x.grad, all_x[rank].grad)


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    env = system.init_data_model_parallel(backend="gloo")
    assert (env.global_size, env.global_rank, env.model_rank, env.data_rank) == (WORLD, rank, rank, 0)
    assert (env.is_distributed, env.local_device) == (True, torch.device("cpu"))
    pairs = net.create_groups_from_world(-1)  # groups of one rank
    assert (pairs.group_count, pairs.data_rank, pairs.model_size, pairs.model_rank) == (WORLD, rank, 1, 0)
    assert (net.get_world_size(pairs.model_group), net.get_world_size(pairs.data_group)) == (1, WORLD)
    assert net.create_groups_from_world(-1) is pairs
    assert net.get_world_size(net.create_standalone_group()) == 1
    assert (net.get_world_size(), net.get_world_rank()) == (WORLD, rank)
    net.barrier()

    for i, o in product(range(3), range(3)):

        def exchanged(xs: list[Tensor], i: int = i, o: int = o) -> list[Tensor]:
            if i == o:
                return [x * 1 for x in xs]
            return [torch.cat([x.chunk(WORLD, dim=o)[r] for x in xs], dim=i) for r in range(WORLD)]

        assert_same(lambda x, i=i, o=o: net.all_to_all(x, i, o) * 1, exchanged)
        assert_same(lambda x, i=i, o=o: net.all_to_all(x, i, o, background=True)() * 1, exchanged)
        assert_same(lambda x, i=i, o=o: net.all_to_all(x, i, o, group=pairs.model_group, use_2dh=True) * 1, exchanged)
    assert_same(net.all_to_all_single, lambda xs: [torch.cat([x.chunk(2)[r] for x in xs]) for r in range(WORLD)])
    for d in range(3):
        assert_same(lambda x, d=d: net.all_gather(x, d, fused=True), lambda xs, d=d: [torch.cat(xs, dim=d)] * WORLD)
        assert_same(lambda x, d=d: net.reduce_scatter(x, d), lambda xs, d=d: list(sum(xs).chunk(WORLD, dim=d)))
        y = net.all_gather(x := tensors(0)[rank].requires_grad_(), d)
        y.backward(torch.full_like(y, float(rank + 1)))
        assert torch.equal(x.grad, torch.full_like(x, float(rank + 1)))  # its own output's gradient alone
        x = tensors(0)[rank].requires_grad_()
        y = net.spatial_split(x, d)
        y.backward(torch.full_like(y, float(rank + 1)))
        assert torch.equal(y, x.chunk(WORLD, dim=d)[rank])
        assert [x.grad.chunk(WORLD, dim=d)[r].unique().tolist() for r in range(WORLD)] == [[1.0], [2.0]]

    all_x = tensors(3)
    x, total = all_x[rank].clone(), sum(all_x)
    assert torch.equal(net.simple_all_reduce(x.transpose(0, 1)), total.transpose(0, 1))
    assert torch.equal(x, all_x[rank])
    assert torch.equal(net.simple_all_reduce(x, op=dist.ReduceOp.MAX), torch.maximum(*all_x))
    assert torch.equal(net.simple_all_gather(x.sum()), torch.stack([each.sum() for each in all_x]))
    assert torch.equal(net.simple_all_gather(x, group=pairs.model_group), x)
    assert torch.equal(net.simple_all_gather(x), torch.cat(all_x))
    assert torch.equal(net.simple_reduce_scatter(x), total.chunk(WORLD)[rank])
    assert torch.equal(net.simple_split(x), x.chunk(WORLD)[rank])
    output, wait = net.simple_all_to_all(x, background=True)
    wait()
    assert torch.equal(output, torch.cat([each.chunk(WORLD)[rank] for each in all_x]))
    for function in (net.allreduce_forward, net.allreduce_backward):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        y.backward(x)
        forward = function is net.allreduce_forward
        assert torch.equal(y, total if forward else x)
        assert torch.equal(leaf.grad, x if forward else total)
    with pytest.raises(ValueError, match=r"input has shape \[3, 2\]: dimension 0 must be a multiple of the 2 ranks"):
        net.simple_reduce_scatter(torch.zeros(3, 2))
    tutel_stand_in.install()
    config = {"type": "ffn", "num_experts_per_device": 2, "hidden_size_per_expert": 4}
    for name in ("tutel.moe", "tutel.impls.moe_layer"):
        divided = importlib.import_module(name).moe_layer("top_any", 8, config)
        assert (divided.world_size, divided.num_local_experts, divided.num_global_experts) == (WORLD, 2, 2 * WORLD)
    alone = importlib.import_module("tutel.moe").moe_layer("top_any", 8, config, group=net.create_standalone_group())
    assert (alone.world_size, alone.num_local_experts, alone.num_global_experts) == (1, 2, 2)
    assert net.simple_all_reduce(x, inplace=True) is x
    assert torch.equal(x, total)
    dist.destroy_process_group()


@pytest.mark.slow
def test_collectives_of_two_processes(tmp_path: Path) -> None:
    spawn_ranks(_rank, (str(tmp_path),), WORLD)
