"""Other packages' experts in the place of the layer's, for `benchmarks.layer --peers`: on a CPU, interleaved.

Every contestant computes the layer's function on the layer's tokens and weights: the gate of `Case.loop` in torch
operations, then its own index, dispatch, experts and combine, and with the backward the gradients of tokens, router and
experts by autograd. Experts have no biases, since those of transformers have none. *Ours* has the auxiliary loss too.

Outputs and gradients are compared with ours first. A contestant that is not installed, fails or differs is not timed,
and the results say why. Ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .common.results import reason
from .common.shapes import Shape
from .common.tensors import difference
from .common.timing import in_turn, ratio, spread
from .peers import LayerPeer, transformers, tutel

if TYPE_CHECKING:
    from .layer import Case

Build = Callable[["Case"], LayerPeer]


def loop(case: Case) -> LayerPeer:
    """The plain loop over the experts."""
    experts = case.layer.experts
    return LayerPeer(case.loop_forward, experts.batched_fc1_w, experts.batched_fc2_w)


def ours(case: Case) -> LayerPeer:
    """The layer, without its auxiliary loss."""
    experts = case.layer.experts
    return LayerPeer(lambda: case.layer(case.x_TD), experts.batched_fc1_w, experts.batched_fc2_w)


# name in the table -> package that it needs, how to build it
PEERS: dict[str, tuple[str, Build]] = {
    "loop": ("torch", loop),
    **{
        f"transformers, {kind}": (transformers.PACKAGE, partial(transformers.build, kind=kind))
        for kind in transformers.KINDS
    },
    "Tutel, padded": (tutel.PACKAGE, tutel.build_layer),
}
ROUTER = ("tokens", "vectors", "thresholds")  # what the router's gradient reaches
COMPARED = ("output", *ROUTER, "up", "down")  # the output, then gradients in the order of `parameters`
LIMIT = 1e-5  # of relative RMS errors, in fp32


def parameters(case: Case, peer: LayerPeer) -> list[Tensor]:
    """The tensors that get gradients."""
    gate = case.layer.gates[0]
    return [case.x_TD, gate.sim_matrix, gate.gates, peer.up, peer.down]


def outcome(case: Case, peer: LayerPeer) -> dict[str, Tensor]:
    """Its output and gradients, the experts' as [E, H, D]."""
    y_TD = peer.forward()
    gradients = torch.autograd.grad(y_TD, parameters(case, peer), case.d_y_TD)
    down = gradients[-1].transpose(1, 2) if peer.down_transposed else gradients[-1]
    return dict(zip(COMPARED, (y_TD.detach(), *gradients[:-1], down), strict=True))


def checked(case: Case, peer: LayerPeer, expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative RMS errors of a peer's outcome against ours; RuntimeError if one is large."""
    errors = {}
    for name, found in outcome(case, peer).items():
        if peer.normalized and name in ROUTER:
            continue
        errors[name] = difference(found, expected[name])
        if not errors[name] < LIMIT:
            what = "output differs" if name == "output" else f"gradient of the {name} differs"
            raise RuntimeError(f"its {what} from ours by {errors[name]:.1e}")
    return errors


def step(case: Case, peer: LayerPeer, backward: bool) -> Any:
    """One forward, or forward and backward."""
    if backward:
        return torch.autograd.grad(peer.forward(), parameters(case, peer), case.d_y_TD)
    with torch.no_grad():
        return peer.forward()


def measure(case: Case, repeats: int) -> list[dict[str, Any]]:
    """Compare each peer with ours, then time those that agree and ours in turn; one result per pass."""
    agreed, peers, expected = {}, {}, outcome(case, ours(case))
    for name, (package, build) in PEERS.items():
        if find_spec(package) is None:
            peers[name] = {"skipped": "not installed"}
            continue
        try:
            peer = build(case)
            peers[name] = {"relative_rms": checked(case, peer, expected)}
        except Exception as error:  # another package may raise anything; the table gets the reason
            if build is loop:
                raise  # then ours may be the one that is wrong
            peers[name] = {"skipped": reason(error)}
            continue
        agreed[name] = peer
    k_T, results = case.routing.k_per_token, []
    for backward in (False, True):
        calls = {"ours": partial(case.ours, backward)}
        calls |= {name: partial(step, case, peer, backward) for name, peer in agreed.items()}
        times = in_turn(calls, repeats)
        timed = {
            name: {**entry, "milliseconds": _milliseconds(times[name]), "over_ours": ratio(times[name], times["ours"])}
            for name, entry in peers.items()
            if name in times
        }
        results.append(
            {
                "shape": asdict(case.shape),
                "pass": "forward+backward" if backward else "forward",
                "mean_k": float(k_T.float().mean()),
                "max_k": int(k_T.max()),
                "ours": {"milliseconds": _milliseconds(times["ours"])},
                "peers": peers | timed,
            }
        )
    return results


def versions() -> dict[str, str | None]:
    """Of each package among the peers; None if no distribution of it is installed."""
    found: dict[str, str | None] = {}
    for package, _ in PEERS.values():
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _milliseconds(times: Sequence[float]) -> dict[str, float]:
    return spread([1e3 * t for t in times])


def table(results: Sequence[dict[str, Any]]) -> str:
    """Peer / ours as Markdown, and why a peer was not timed."""
    names = list(PEERS)
    lines = [f"| shape | pass | max k | {' | '.join(names)} |", "|---" * (len(names) + 3) + "|"]
    whys = {}
    for r in results:
        cells = []
        for name in names:
            entry = r["peers"][name]
            over = entry.get("over_ours")
            cells.append(
                f"**{over['median']:.2f}** ({over['quartile_1']:.2f} to {over['quartile_3']:.2f})" if over else "-"
            )
            if not over:
                whys[f"{name}: {entry['skipped']}"] = None
        lines.append(f"| {Shape(**r['shape'])} | {r['pass']} | {r['max_k']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"Not timed: {why}." for why in whys)]).rstrip()
