import math

import pytest
import torch
from chosen import doubles
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from twin import inner

from mogd import UnbiasedMultiGradient
from mogd import packs as module
from mogd.moments import Moments, bias_corrected
from mogd.packs import norm

CPU = torch.device("cpu")
decays = st.sampled_from([0.0, 0.5, 0.9, 0.999])
entries = st.integers(-8, 8).map(float)


def parameter(n, dtype=torch.float64):
    return torch.zeros(n, dtype=dtype, requires_grad=True)


def feed(moments, *steps, **options):
    """Update with a list of steps, each of one mapping a loss."""
    for gradients in steps:
        norms = torch.stack([norm(of_loss, CPU) for of_loss in gradients])
        moments.update(gradients, norms, **options)


def averages(moments):
    """m̂ of each parameter, v̂, the Gramian of m̂ and t, as copies."""
    state = moments.state_dict(list(moments.parameters))
    return {
        "count": state["count"].clone(),
        "late": state["late"].clone(),
        "norms": state["norms"].clone(),
        "gramian": state["gramian"].clone(),
        **{f"exp_avg {i}": average.flatten(1).clone() for i, average in state["exp_avg"].items()},
    }


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert_close(found[name], expected[name], rtol=0, atol=0, equal_nan=True)


@settings(max_examples=40)
@given(
    st.integers(1, 3).flatmap(
        lambda k: st.lists(
            st.lists(st.tuples(entries, entries, entries), min_size=k, max_size=k),
            min_size=1,
            max_size=12,
        )
    ),
    decays,
    decays,
)
def test_moments_are_those_of_a_plain_loop_over_the_algorithm(stream, beta_1, beta_2):
    p, q = parameter(2), parameter(1)
    losses = len(stream[0])
    moments = Moments((beta_1, beta_2), losses, CPU)
    m_hat, v_hat, began = [[0.0] * 3 for _ in range(losses)], [0.0] * losses, [0] * losses
    for gradients in stream:
        doubles = [torch.tensor(g, dtype=torch.float64) for g in gradients]
        feed(moments, [{p: g[:2], q: g[2:]} for g in doubles])
        for k, g in enumerate(gradients):  # lines 4-7
            m_hat[k] = [beta_1 * m + (1 - beta_1) * x for m, x in zip(m_hat[k], g, strict=True)]
            v_hat[k] = beta_2 * v_hat[k] + (1 - beta_2) * math.hypot(*g)
            began[k] += began[k] > 0 or any(g)
        steps = [max(t, 1) for t in began]
        m = [  # lines 8-9
            [x / (1 - beta_1**t) for x in row] for row, t in zip(m_hat, steps, strict=True)
        ]
        v = [x / (1 - beta_2**t) for x, t in zip(v_hat, steps, strict=True)]  # lines 10-11
        gramian = torch.tensor([[inner(a, b) for a in m] for b in m], dtype=torch.float64)
        assert_close(moments.gramian(), gramian, rtol=1e-9, atol=1e-9)
        assert_close(moments.norms(), torch.tensor(v, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("decay", [(0.0, 0.0), (0.9, 0.99), (0.999999, 0.999999)])
def test_constant_gradients_are_their_own_moments_from_the_first_step_on(decay):
    p = parameter(2, torch.float32)
    moments = Moments(decay, 2, CPU)
    gradients = [{p: torch.tensor([3.0, 4.0])}, {p: torch.tensor([-4.0, 0.0])}]
    for _ in range(3):
        feed(moments, gradients)
        expected = torch.tensor([[25.0, -12.0], [-12.0, 16.0]], dtype=torch.float64)
        assert_close(moments.gramian(), expected, rtol=1e-5, atol=0)
        assert_close(moments.norms(), torch.tensor([5.0, 4.0], dtype=torch.float64))


def test_before_any_gradient_all_is_zero():
    moments = Moments((0.9, 0.99), 3, CPU)
    assert moments.losses == 3
    assert_close(moments.gramian(), torch.zeros(3, 3, dtype=torch.float64), rtol=0, atol=0)
    assert_close(moments.norms(), torch.zeros(3, dtype=torch.float64), rtol=0, atol=0)


def test_bias_correction_has_the_values_computed_by_hand():
    average = torch.tensor([1.0, 2.0], dtype=torch.float64)
    steps = torch.tensor([2, 1])
    # 1 - 0.5² = 0.75, 1 - 0.5 = 0.5
    assert_close(bias_corrected(average, 0.5, steps), doubles(1 / 0.75, 2 / 0.5))
    pairs = torch.tensor([[9.0, 3.0], [3.0, 2.0]], dtype=torch.float64)
    expected = torch.tensor([[16.0, 8.0], [8.0, 8.0]], dtype=torch.float64)
    assert_close(bias_corrected(pairs, 0.5, steps), expected)
    # 1 - 0.5⁰ = 0, by which nothing can be divided
    assert bias_corrected(0 * average, 0.5, 0 * steps).tolist() == [0, 0]


@pytest.mark.parametrize("before", [1, 200])
@pytest.mark.parametrize("saved", [False, True], ids=["unbroken", "saved"])
def test_a_loss_that_begins_late_has_moments_as_from_a_first_step(before, saved):
    p = parameter(2)
    moments, waiting = Moments((0.9, 0.99), 2, CPU), torch.tensor(False)
    first, second = doubles(3.0, 4.0), doubles(-4.0, 0.0)
    off = [{p: first}, {p: 0 * second}]
    feed(moments, *[off] * before)
    feed(moments, off, [{p: first}, {p: second}], keep=waiting)  # which counts for nothing
    assert moments.norms().tolist() == pytest.approx([5, 0])
    if saved:
        moments = Moments.from_state_dict(moments.state_dict([p]), moments.decay, [p], CPU)
    for _ in range(3):
        feed(moments, [{p: first}, {p: second}])
        assert_close(moments.norms(), doubles(5.0, 4.0))
        expected = torch.tensor([[25.0, -12.0], [-12.0, 16.0]], dtype=torch.float64)
        assert_close(moments.gramian(), expected)


def test_parameters_may_lie_on_several_devices():
    """By what would be computed where: no GPU is needed for that."""
    with FakeTensorMode():
        parameters = [torch.empty(3, 2, device=f"cuda:{index}") for index in range(2)]
        moments = Moments((0.9, 0.99), 2, parameters[0].device)
        gradients = [{p: torch.empty_like(p) for p in parameters} for _ in range(2)]
        norms = torch.empty(2, dtype=torch.float64, device="cuda:0")
        for keep in (None, torch.empty((), dtype=torch.bool, device="cuda:0")):
            moments.update(gradients, norms, keep=keep)
        assert [average.device.index for average in moments._exp_avgs._vectors] == [0, 1]


@pytest.mark.parametrize("scale", [0.25, 1.0, 2.0**100])
def test_scale_multiplies_the_gradients_first(scale):
    p = parameter(2)
    scaled, plain = Moments((0.9, 0.99), 1, CPU), Moments((0.9, 0.99), 1, CPU)
    for values in ([1.0, 2.0], [3.0, -1.0]):
        gradient = torch.tensor(values, dtype=torch.float64)
        norms = gradient.norm()[None]
        scaled.update([{p: gradient / scale}], norms, scale=torch.tensor(scale))
        plain.update([{p: gradient}], norms)
    assert_same_bits(averages(scaled), averages(plain))


@pytest.mark.parametrize("decay", [(0.0, 0.0), (0.9, 0.99), (0.3, 0.6)])
@pytest.mark.parametrize("bad", [1.0, math.nan, math.inf])
@pytest.mark.parametrize("scale", [None, torch.tensor(0.5)])
def test_keep_decides_on_the_whole_step_to_the_bit(decay, bad, scale):
    p = parameter(3, torch.float32)
    moments, unmasked = Moments(decay, 2, CPU), Moments(decay, 2, CPU)
    torch.manual_seed(0)
    good = [[{p: torch.randn(3)}, {p: torch.randn(3)}] for _ in range(3)]
    feed(unmasked, *good)
    feed(moments, *good, keep=torch.tensor(True))
    assert_same_bits(averages(moments), averages(unmasked))
    before = averages(moments)
    feed(
        moments,
        [{p: torch.full((3,), bad)}, {p: torch.ones(3)}],
        keep=torch.tensor(False),
        scale=scale,
    )
    assert_same_bits(averages(moments), before)


def test_absent_gradients_count_as_zero():
    p, q = parameter(2), parameter(1)
    one, two = torch.ones(2, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    absent, zero = Moments((0.5, 0.5), 2, CPU), Moments((0.5, 0.5), 2, CPU)
    feed(absent, [{p: one}, {q: two}], [{p: one}, {p: one}], [{}, {q: two}])
    feed(
        zero,
        [{p: one, q: 0 * two}, {p: 0 * one, q: two}],
        [{p: one, q: 0 * two}, {p: one, q: 0 * two}],
        [{p: 0 * one, q: 0 * two}, {p: 0 * one, q: two}],
    )
    assert_same_bits(averages(absent), averages(zero))
    # m̂ = (1/2, 1/2), halved over and over
    assert averages(absent)["exp_avg 0"][0].tolist() == [0.375, 0.375]


def test_a_parameter_that_comes_late_has_a_past_of_zeros():
    p, late = parameter(1), parameter(1)
    g = torch.tensor([2.0], dtype=torch.float64)
    moments = Moments((0.5, 0.5), 1, CPU)
    feed(moments, [{p: g}], [{p: g, late: g}])
    # m = (2, ½·2 / (1 - ½²)) = (2, 4/3)
    assert_close(moments.gramian(), torch.tensor([[4 + 16 / 9]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("of_parameter", "of_moment"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex64, torch.float32),
        (torch.complex128, torch.float64),
    ],
)
def test_moments_are_kept_in_float32_at_least(of_parameter, of_moment):
    p = parameter(3, of_parameter)
    moments = Moments((0.9, 0.99), 1, CPU)
    feed(moments, [{p: torch.ones(3, dtype=of_parameter)}])
    assert averages(moments)["exp_avg 0"].dtype == of_moment
    assert moments.gramian().dtype == moments.norms().dtype == torch.float64


def test_half_precision_gradients_average_without_rounding_the_average_to_their_precision():
    p = parameter(1, torch.bfloat16)
    moments = Moments((0.999, 0.999), 1, CPU)
    # Steps of 0.001 would be lost on a bfloat16 average near 1.
    for _ in range(2000):
        feed(moments, [{p: torch.ones(1, dtype=torch.bfloat16)}])
    assert_close(averages(moments)["exp_avg 0"][0, 0].item(), 1 - 0.999**2000, rtol=1e-4, atol=0)


def test_complex_gradients_are_pairs_of_real_ones():
    z, x = parameter(2, torch.complex128), parameter(4)
    of_complex, of_real = Moments((0.9, 0.99), 2, CPU), Moments((0.9, 0.99), 2, CPU)
    torch.manual_seed(0)
    for _ in range(3):
        g = torch.randn(2, 4, dtype=torch.float64)
        feed(of_complex, [{z: torch.complex(row[::2], row[1::2])} for row in g])
        feed(of_real, [{x: row} for row in g])
    assert_same_bits(averages(of_complex), averages(of_real))


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_the_size_of_the_blocks_does_not_matter(monkeypatch, block):
    p, q = parameter((8, 25)), parameter(3)
    torch.manual_seed(0)
    stream = [
        [{p: torch.randn_like(p), q: torch.randn_like(q)}, {p: torch.randn_like(p)}]
        for _ in range(3)
    ]
    whole, blocks = Moments((0.9, 0.99), 2, CPU), Moments((0.9, 0.99), 2, CPU)
    feed(whole, *stream)
    monkeypatch.setattr(module, "BLOCK", block)
    feed(blocks, *stream)
    assert_close(blocks.gramian(), whole.gramian())
    assert_close(blocks.norms(), whole.norms())
    assert_close(averages(blocks)["exp_avg 0"], averages(whole)["exp_avg 0"], rtol=0, atol=0)


def test_a_parameter_larger_than_a_block_enters_whole():
    p = parameter(2 * module.BLOCK + 5, torch.float32)
    moments = Moments((0.0, 0.0), 2, CPU)
    gradients = [{p: torch.ones_like(p)}, {p: torch.full_like(p, 2.0)}]
    feed(moments, [{p: g[p].detach()} for g in gradients])
    n = p.numel()
    expected = torch.tensor([[n, 2 * n], [2 * n, 4 * n]], dtype=torch.float64)
    assert_close(moments.gramian(), expected)
    assert_close(moments.norms(), expected.diagonal().sqrt())


def test_entries_are_paired_by_place_whatever_the_memory_order():
    p = parameter((2, 3))
    g = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
    moments = Moments((0.0, 0.0), 2, CPU)
    feed(moments, [{p: g}, {p: g.t().contiguous().t()}])
    assert_close(moments.gramian(), torch.full((2, 2), 55.0, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_beyond_float32_are_kept(scale):
    p = parameter(2, torch.float32)
    moments = Moments((0.9, 0.99), 2, CPU)
    feed(moments, [{p: scale * torch.tensor([3.0, 4.0])}, {p: scale * torch.tensor([4.0, 3.0])}])
    expected = scale**2 * torch.tensor([[25.0, 24.0], [24.0, 25.0]], dtype=torch.float64)
    assert_close(moments.gramian(), expected, rtol=1e-5, atol=0)
    assert_close(moments.norms() / scale, torch.full((2,), 5.0, dtype=torch.float64))


def test_norm_is_that_of_all_parameters_together():
    p, q = parameter(1, torch.float32), parameter((1, 2), torch.complex64)
    gradients = {p: torch.tensor([2.0]), q: torch.tensor([[3 + 4j, 1 - 1j]])}
    assert_close(norm(gradients, CPU), torch.tensor(math.sqrt(4 + 25 + 2), dtype=torch.float64))
    assert norm({}, CPU) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_norm_shows_an_entry_that_is_not_finite(value):
    p, q = parameter(2), parameter(1)
    finite = torch.ones(1, dtype=torch.float64)
    for entries in ([value, 1.0], [1.0, value]):
        gradients = {q: finite, p: torch.tensor(entries, dtype=torch.float64)}
        assert not norm(gradients, CPU).isfinite()


@pytest.mark.parametrize("decay", [(0.9, 0.9), (0.9, 0.99), (0.9, 0.5), (0.5, 0.9)])
@pytest.mark.parametrize("keep", [None, torch.tensor(True)])
def test_a_loss_without_a_gradient_for_long_is_forgotten_and_begins_anew(decay, keep):
    p, gradient, other = parameter(2, torch.float32), torch.tensor([3.0, 4.0]), torch.ones(2)
    moments, new = Moments(decay, 2, CPU), Moments(decay, 2, CPU)
    feed(moments, *[[{p: other}, {p: gradient}]] * 20, keep=keep)
    for _ in range(1200):
        feed(moments, [{p: other}, {}], keep=keep)
        lengths = moments.gramian().diagonal().sqrt()
        assert moments.norms().isfinite().all()
        assert (lengths <= 1e33 * moments.norms()).all()  # what weights are made of
    assert moments.norms()[1] == 0
    assert moments.gramian()[1].tolist() == [0, 0]
    feed(moments, *[[{p: other}, {p: gradient}]] * 3, keep=keep)
    feed(new, *[[{p: other}, {p: gradient}]] * 3)
    assert_close(moments.norms()[1], new.norms()[1])
    assert_close(moments.gramian()[1, 1], new.gramian()[1, 1])


@pytest.mark.parametrize("decay", [(0.999, 0.9), (0.99, 0.5), (0.9, 0.9), (0.5, 0.9)])
def test_a_loss_is_as_new_right_after_it_was_forgotten(decay):
    p, gradient, other = parameter(2, torch.float32), torch.tensor([3.0, 4.0]), torch.ones(2)
    moments, new = Moments(decay, 2, CPU), Moments(decay, 2, CPU)
    feed(moments, *[[{p: other}, {p: -gradient}]] * 5)
    while moments.norms()[1] > 0:
        feed(moments, [{p: other}, {}])
    feed(moments, [{p: other}, {p: gradient}])
    feed(new, [{p: other}, {p: gradient}])
    assert_close(moments.norms()[1], new.norms()[1])
    assert_close(moments.gramian()[1, 1], new.gramian()[1, 1])


@pytest.mark.parametrize("size", [1e-140, 1e-60])
def test_small_gradients_in_float64_are_not_forgotten(size):
    p = parameter(2)
    moments = Moments((0.9, 0.99), 1, CPU)
    feed(moments, [{p: size * doubles(3, 4)}])
    assert_close(moments.norms() / size, doubles(5))
    assert_close(moments.gramian()[0] / size / size, doubles(25))


def test_what_is_dropped_forgets_nothing_new():
    p = parameter(2)
    moments = Moments((0.9, 0.99), 2, CPU)
    feed(moments, *[[{p: doubles(1, 1)}, {p: doubles(3, 4)}]] * 3)
    before = averages(moments)
    feed(moments, *[[{p: doubles(1, 1)}, {}]] * 2000, keep=torch.tensor(False))
    assert_same_bits(averages(moments), before)


def test_averages_follow_parameters_into_another_type():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = UnbiasedMultiGradient([p], lr=0.0)
    for _ in range(2):
        optimizer.step(lambda: (p.sum(), p[0]))
    p.data = p.data.double()
    for _ in range(2):
        record = optimizer.step(lambda: (1e60 * p.sum(), p[0]))
    assert record.weights.isfinite().all()
    assert record.gramian[0, 0] > 1e110
