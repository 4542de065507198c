"""Small tensors are worked on together, large ones in place and block by block."""

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from mogd import packs
from mogd.moments import Moments
from mogd.packs import BLOCK, Doubles, blocks, groups, joined, norm

CPU = torch.device("cpu")
sizes = st.lists(st.integers(0, 12), max_size=20)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(packs, "BLOCK", 8)


def tensors(sizes, dtype=torch.float32):
    return [torch.arange(size, dtype=dtype) for size in sizes]


def positions(found, of):
    """Groups of tensors as groups of their indices."""
    index = {id(tensor): position for position, tensor in enumerate(of)}
    return [[index[id(tensor)] for tensor in group] for group in found]


def test_small_tensors_share_a_group_up_to_a_block(small_blocks):
    of = tensors([3, 5, 9, 1, 8, 2, 6])
    assert positions(groups(of), of) == [[0, 1], [2], [3], [4], [5, 6]]


def test_a_large_tensor_does_not_close_the_group_before_it(small_blocks):
    of = tensors([3, 9, 5])
    assert positions(groups(of), of) == [[0, 2], [1]]


def test_dtypes_are_not_mixed():
    of = [torch.zeros(1), torch.zeros(1).double(), torch.zeros(1)]
    assert positions(groups(of), of) == [[0, 2], [1]]


@given(sizes)
def test_every_tensor_is_in_one_group_and_small_groups_fit_a_block(sizes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packs, "BLOCK", 8)
        of = tensors(sizes)
        found = groups(of)
    assert sorted(chain.from_iterable(positions(found, of))) == list(range(len(of)))
    assert all(len(group) == 1 or sum(map(len, group)) <= 8 for group in found)


@given(sizes, sizes)
def test_later_tensors_only_extend_groups_or_start_new_ones(earlier, later):
    """Else the moments of a parameter that comes late would move those of the others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packs, "BLOCK", 8)
        of = tensors(earlier + later)
        before, after = positions(groups(of[: len(earlier)]), of), positions(groups(of), of)
    assert [group[: len(old)] for old, group in zip(before, after, strict=False)] == before


def test_blocks_hold_all_entries_and_are_views_of_what_is_large(small_blocks):
    large, *small = tensors([20, 3, 2])
    parts, [both] = list(blocks([large])), blocks(small)
    assert [len(part) for part in parts] == [8, 8, 4]
    assert torch.equal(torch.cat(parts), large)
    assert parts[0].data_ptr() == large.data_ptr()
    assert both.tolist() == [0, 1, 2, 0, 1]


def test_joined_tensors_are_real_and_in_the_order_of_their_indices():
    matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).t()
    assert joined([matrix, torch.tensor(5.0)]).tolist() == [1, 3, 2, 4, 5]
    assert joined([torch.tensor([1 + 2j]), torch.tensor([[3 - 4j]])]).tolist() == [1, 2, 3, -4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_doubles_are_the_numbers_of_each_block_in_the_same_memory(dtype):
    doubles = Doubles()
    addresses = set()
    for shape in ((2, 4), (3,), (2, 2)):
        block = torch.randn(shape).to(dtype)
        found = doubles(block)
        assert found.dtype is torch.float64
        assert torch.equal(found, block.double())
        addresses.add(found.data_ptr())
    assert (len(addresses) == 1) == (dtype is not torch.float64)  # itself, where it is one


class Count(TorchDispatchMode):
    """How many tensor operations that are no mere views are called inside."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += not func.is_view
        return func(*args, **(kwargs or {}))


def operations(shapes):
    """Of the norms and of an update of moments that exist already."""
    parameters = [torch.zeros(shape, requires_grad=True) for shape in shapes]
    gradients = [{p: torch.ones_like(p).detach() for p in parameters} for _ in range(2)]
    moments = Moments((0.9, 0.99), 2, CPU)
    moments.update(gradients, torch.ones(2).double())
    with Count() as count:
        norms = torch.stack([norm(of_loss, CPU) for of_loss in gradients])
        moments.update(gradients, norms)
    assert_close(norms, torch.full((2,), sum(map(torch.Size.numel, shapes))).double().sqrt())
    return count.calls


def test_many_small_parameters_take_no_more_operations_than_two():
    shape = torch.Size([4, 3])
    assert operations([shape] * 40) == operations([shape] * 2)
    assert operations([torch.Size([BLOCK])] * 2) > operations([shape] * 2)


@pytest.mark.parametrize("late", [1, 5, BLOCK + 3])
def test_moments_of_the_others_stay_when_a_parameter_comes_late(late):
    p, q, new = (torch.zeros(n, requires_grad=True) for n in (3, BLOCK + 1, late))
    gradients = {t: torch.randn(t.shape) for t in (p, q, new)}
    first = {t: gradients[t] for t in (p, q)}
    moments = Moments((0.5, 0.5), 1, CPU)
    moments.update([first], torch.ones(1).double())
    moments.update([gradients], torch.ones(1).double())
    found = moments.state_dict([p, q, new])["exp_avg"]
    assert list(found) == [0, 1, 2]
    for position, (tensor, factor) in enumerate(((p, 0.75), (q, 0.75), (new, 0.5))):
        assert_close(found[position][0], factor * gradients[tensor])
    resumed = Moments.from_state_dict(moments.state_dict([p, q, new]), (0.5, 0.5), [p, q, new], CPU)
    for each in (moments, resumed):
        each.update([gradients], torch.ones(1).double())
    assert torch.equal(moments.gramian(), resumed.gramian())
