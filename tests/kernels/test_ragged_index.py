"""Bitmasks, the index in both directions, and the assignments that a bounded capacity drops, against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynmoe_tutel.kernels import bound_assignments, pack_bits, ragged_index, unpack_bits

EXPERTS = (1, 2, 63, 64, 65, 128, 200, 512)
TOKENS = (0, 1, 7, 33)


def assignment(T: int, E: int, density: float, seed: int = 0) -> Tensor:
    """A random map [T, E], with an empty token and an empty expert if there is room."""
    generator = torch.Generator().manual_seed(seed)
    assigned_TE = torch.rand(T, E, generator=generator) < density
    if 0 < density < 1:
        assigned_TE[T // 2 : T // 2 + 1] = False
        assigned_TE[:, E // 2 : E // 2 + 1] = False
    return assigned_TE


def naive_index(assigned_TE: Tensor) -> tuple[list[int], list[int], list[int], list[int]]:
    """expert_offsets, token_offsets, token_of_row, row_of_assignment by two loops."""
    T, E = assigned_TE.shape
    table = assigned_TE.tolist()
    expert_offsets, token_of_row, row_of_pair = [0], [], {}
    for e in range(E):
        for t in range(T):
            if table[t][e]:
                row_of_pair[t, e] = len(token_of_row)
                token_of_row.append(t)
        expert_offsets.append(len(token_of_row))
    token_offsets, row_of_assignment = [0], []
    for t in range(T):
        row_of_assignment += [row_of_pair[t, e] for e in range(E) if table[t][e]]
        token_offsets.append(len(row_of_assignment))
    return expert_offsets, token_offsets, token_of_row, row_of_assignment


def naive_bound(assigned_TE: Tensor, margin_TE: Tensor, capacity: int) -> Tensor:
    """Drop one assignment at a time: the smallest margin, among equals the last in token-major order."""
    assigned_TE = assigned_TE.clone()
    while int(assigned_TE.sum()) > capacity:
        pairs = assigned_TE.nonzero().tolist()
        t, e = min(reversed(pairs), key=lambda pair: float(margin_TE[pair[0], pair[1]]))
        assigned_TE[t, e] = False
    return assigned_TE


class TestBits:
    @pytest.mark.parametrize("E", EXPERTS)
    @pytest.mark.parametrize("T", TOKENS)
    def test_expert_e_is_bit_e_mod_64_of_word_e_div_64(self, T: int, E: int) -> None:
        assigned_TE = assignment(T, E, 0.5)
        bits_TW = pack_bits(assigned_TE)
        assert bits_TW.shape == (T, -(-E // 64))
        assert bits_TW.dtype == torch.int64
        words = bits_TW.tolist()
        read = [[bool(words[t][e // 64] >> (e % 64) & 1) for e in range(E)] for t in range(T)]
        assert read == assigned_TE.tolist()

    @pytest.mark.parametrize("E", EXPERTS)
    def test_nothing_is_set_behind_the_last_expert(self, E: int) -> None:
        word = pack_bits(torch.ones(1, E, dtype=torch.bool))[0, -1].item()
        assert word & (2**64 - 1) == 2 ** ((E - 1) % 64 + 1) - 1

    @pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("E", EXPERTS)
    @pytest.mark.parametrize("T", TOKENS)
    def test_unpack_inverts_pack(self, T: int, E: int, density: float) -> None:
        assigned_TE = assignment(T, E, density)
        read = unpack_bits(pack_bits(assigned_TE), E)
        assert read.dtype == torch.bool
        assert torch.equal(read, assigned_TE)

    def test_inputs_of_any_strides(self) -> None:
        wide = assignment(14, 260, 0.4)
        for view in (wide[::2, ::2], wide.t(), wide[:, 3:133], wide[:1].expand(9, 260)):
            assert torch.equal(pack_bits(view), pack_bits(view.contiguous()))
        long = assignment(1, 3 * 64 + 5, 0.5)[0]
        for start in range(6):  # contiguous, at any offset of its storage
            view = long[start : start + 128].view(2, 64)
            assert torch.equal(pack_bits(view), pack_bits(view.clone()))
        bits = pack_bits(wide)
        for view in (bits[::3], bits.t().contiguous().t()):
            assert torch.equal(unpack_bits(view, 260), unpack_bits(view.contiguous(), 260))


class TestIndex:
    @pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("E", EXPERTS)
    @pytest.mark.parametrize("T", TOKENS)
    def test_equals_the_loops(self, T: int, E: int, density: float) -> None:
        assigned_TE = assignment(T, E, density)
        index = ragged_index(pack_bits(assigned_TE), E)
        assert all(part.dtype == torch.int32 and part.is_contiguous() for part in index)
        assert [part.tolist() for part in index] == list(naive_index(assigned_TE))

    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 20), st.integers(1, 140), st.floats(0, 1), st.integers(0, 10**6))
    def test_the_two_directions_are_inverse(self, T: int, E: int, density: float, seed: int) -> None:
        assigned_TE = torch.rand(T, E, generator=torch.Generator().manual_seed(seed)) < density
        expert_offsets, token_offsets, token_of_row, row_of_assignment = ragged_index(pack_bits(assigned_TE), E)
        A = int(assigned_TE.sum())
        assert torch.equal(expert_offsets.diff(), assigned_TE.sum(0, dtype=torch.int32))
        assert torch.equal(token_offsets.diff(), assigned_TE.sum(1, dtype=torch.int32))
        assert torch.equal(row_of_assignment.sort().values, torch.arange(A, dtype=torch.int32))
        token_of_assignment = torch.arange(T, dtype=torch.int32).repeat_interleave(token_offsets.diff())
        assert torch.equal(token_of_row[row_of_assignment], token_of_assignment)

    @pytest.mark.parametrize("spare", [0, 1, 50])
    def test_with_a_capacity_the_rows_are_padded_by_minus_one(self, spare: int) -> None:
        assigned_TE = assignment(9, 70, 0.3)
        bits = pack_bits(assigned_TE)
        exact = ragged_index(bits, 70)
        A = exact[2].shape[0]
        padded = ragged_index(bits, 70, A + spare)
        for i in (0, 1):
            assert torch.equal(padded[i], exact[i])
        for i in (2, 3):
            assert padded[i].shape == (A + spare,)
            assert torch.equal(padded[i][:A], exact[i])
            assert (padded[i][A:] == -1).all()

    def test_capacity_zero_holds_nothing(self) -> None:
        index = ragged_index(pack_bits(assignment(3, 5, 0.0)), 5, 0)
        assert [part.tolist() for part in index] == [[0] * 6, [0] * 4, [], []]

    def test_a_capacity_that_is_too_small_is_refused(self) -> None:
        with pytest.raises(ValueError, match="capacity = 5 rows is less than the 6 assignments"):
            ragged_index(pack_bits(assignment(2, 3, 1.0)), 3, 5)

    def test_two_runs_are_bitwise_equal(self) -> None:
        bits = pack_bits(assignment(500, 65, 0.2))
        for first, second in zip(ragged_index(bits, 65), ragged_index(bits, 65), strict=True):
            assert torch.equal(first, second)

    @pytest.mark.parametrize(("T", "E", "capacity"), [(7, 65, -1), (7, 65, 600), (0, 3, -1), (4, 3, -1)])
    def test_opcheck(self, T: int, E: int, capacity: int) -> None:
        torch.library.opcheck(ragged_index, (pack_bits(assignment(T, E, 0.4)), E, capacity))


class TestBoundAssignments:
    @pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 1.0])
    @pytest.mark.parametrize(("T", "E"), [(7, 3), (5, 65), (1, 1), (3, 130)])
    @pytest.mark.parametrize("levels", [2, 5, 10**6])
    def test_drops_exactly_the_smallest_margins(self, T: int, E: int, keep: float, levels: int) -> None:
        """Few `levels` give many equal margins, of which the later ones are dropped."""
        assigned_TE = assignment(T, E, 0.6, seed=levels)
        margin_TE = torch.randint(levels, (T, E), generator=torch.Generator().manual_seed(T)).float() / levels - 0.5
        capacity = int(keep * int(assigned_TE.sum()))
        bits, dropped = bound_assignments(pack_bits(assigned_TE), margin_TE, capacity)
        assert torch.equal(unpack_bits(bits, E), naive_bound(assigned_TE, margin_TE, capacity))
        assert dropped.dtype == torch.int64
        assert dropped.shape == ()
        assert int(dropped) == int(assigned_TE.sum()) - capacity

    def test_margins_of_pairs_without_assignment_do_not_count(self) -> None:
        assigned_TE = torch.tensor([[True, False, True]])
        bits, _ = bound_assignments(pack_bits(assigned_TE), torch.tensor([[0.5, -9.0, 0.1]]), 1)
        assert unpack_bits(bits, 3).tolist() == [[True, False, False]]

    def test_what_fits_is_a_copy(self) -> None:
        bits = pack_bits(assignment(7, 5, 0.5))
        kept, dropped = bound_assignments(bits, torch.rand(7, 5), 35)
        assert torch.equal(kept, bits)
        assert kept.data_ptr() != bits.data_ptr()
        assert int(dropped) == 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_margins_of_any_strides(self, dtype: torch.dtype) -> None:
        bits, margin_ET = pack_bits(assignment(7, 5, 0.9)), torch.rand(5, 7, dtype=dtype)
        strided, _ = bound_assignments(bits, margin_ET.t(), 11)
        contiguous, _ = bound_assignments(bits, margin_ET.t().contiguous(), 11)
        assert torch.equal(strided, contiguous)

    def test_two_runs_are_bitwise_equal(self) -> None:
        bits = pack_bits(assignment(300, 65, 0.5))
        margin_TE = torch.randint(4, (300, 65)).float()
        first, second = (bound_assignments(bits, margin_TE, 1000)[0] for _ in range(2))
        assert torch.equal(first, second)

    @pytest.mark.parametrize("capacity", [0, 3, 100])
    def test_opcheck(self, capacity: int) -> None:
        torch.library.opcheck(bound_assignments, (pack_bits(assignment(7, 5, 0.6)), torch.rand(7, 5), capacity))
