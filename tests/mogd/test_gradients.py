import weakref

import pytest
import torch
from torch.testing import assert_close

from mogd.gradients import LossGradients, combine, each


def parameter(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def linear(gradient, *parameters):
    """A loss with a chosen gradient for each of the parameters."""
    return sum((torch.as_tensor(g) * p).sum() for g, p in zip(gradient, parameters, strict=True))


def taken(losses, *parameters):
    collected = LossGradients()
    collected.add(losses, parameters, None)
    return collected


def test_each_loss_has_its_value_and_its_own_gradient():
    p, q = parameter(1.0, 2.0), parameter(3.0)
    collected = taken([linear(([1.0, 2.0], 3.0), p, q), linear(([4.0, 5.0],), p)], p, q)
    assert [float(loss) for loss in collected.losses] == [14.0, 14.0]
    first, second = collected.gradients
    assert {**first}.keys() == {p, q}
    assert first[p].tolist() == [1, 2]
    assert first[q].tolist() == [3]
    assert {**second}.keys() == {p}
    assert second[p].tolist() == [4, 5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("weight", [3e38, 4e38, -5e60, 1e83, 0.5])
def test_a_weight_may_exceed_what_the_gradients_can_hold(dtype, weight):
    tiny = {torch.float16: 6e-8, torch.float32: 1e-45, torch.float64: 1e-45}[dtype]
    p = parameter(1.0, 1.0, dtype=dtype)
    gradient = torch.tensor([tiny, 0.0], dtype=dtype)
    weights = torch.tensor([weight], dtype=torch.float64)
    combined = combine([{p: gradient.clone()}], weights)[p]
    expected = gradient.double() * weight
    if abs(expected[0]) < torch.finfo(dtype).max:
        assert_close(combined, expected.to(dtype))
    assert combined[1] == 0


def test_no_gradient_is_left_on_the_parameters():
    p, q = parameter(1.0), parameter(2.0)
    p.grad, q.grad = torch.tensor([7.0]), torch.tensor([8.0])
    collected = taken([linear((1.0,), p)], p, q)
    assert p.grad is None
    assert q.grad is None
    assert collected.gradients[0][p].tolist() == [1.0]


def test_values_and_gradients_add_up_over_calls():
    p, q = parameter(1.0), parameter(1.0)
    collected = LossGradients()
    collected.add([linear((1.0,), p), linear((2.0,), p)], [p, q], None)
    collected.add([linear((10.0, 5.0), p, q), linear((20.0,), p)], [p, q], None)
    assert [float(loss) for loss in collected.losses] == [16, 22]
    assert [float(g[p]) for g in collected.gradients] == [11, 22]
    assert collected.gradients[0][q].tolist() == [5]
    assert q not in collected.gradients[1]


def test_the_collected_tensors_have_no_graph():
    p = parameter(1.0)
    collected = taken([(p**2).sum()], p)
    assert not collected.losses[0].requires_grad
    assert not collected.gradients[0][p].requires_grad


@pytest.mark.parametrize("kind", [list, tuple, torch.stack])
def test_the_losses_of_a_sequence_may_share_a_graph(kind):
    p = parameter(2.0)
    shared = (p**2).exp().sum()
    collected = taken(kind([shared, shared * 3, shared.log()]), p)
    slope = 4.0 * torch.e**4
    assert_close(
        torch.cat([g[p] for g in collected.gradients]), torch.tensor([slope, 3 * slope, 4.0])
    )


def test_a_sequence_frees_the_shared_graph_in_the_end():
    p = parameter(2.0)
    shared = (p**2).sum()
    taken([shared * 1, shared * 2], p)
    with pytest.raises(RuntimeError, match="second time"):
        shared.backward()


class Saved:
    """A tensor that autograd keeps for backward; counts their elements, now and at most."""

    now = most = 0

    def __init__(self, tensor):
        self.tensor = tensor.detach()
        Saved.now += tensor.numel()
        Saved.most = max(Saved.most, Saved.now)

    def __del__(self):
        Saved.now -= self.tensor.numel()

    def unpack(self):
        return self.tensor


def loss_of(p, size):
    """A loss that saves twice ``size`` elements for its backward pass."""
    return p.expand(size).exp().sin().sum()


def most_saved(losses, p):
    """The most elements saved at a time while the losses are differentiated."""
    Saved.now = Saved.most = 0
    with torch.autograd.graph.saved_tensors_hooks(Saved, Saved.unpack):
        taken(losses(), p)
    assert Saved.now == 0
    return Saved.most


def test_a_lazy_graph_is_freed_before_the_next_is_built():
    p, at_start = parameter(1.0), []

    def lazily():
        for size in (100, 300, 200):
            at_start.append(Saved.now)
            yield loss_of(p, size)

    largest = most_saved(lambda: [loss_of(p, 300)], p)
    assert most_saved(lazily, p) == largest
    assert most_saved(lambda: list(lazily()), p) == 2 * largest
    assert at_start == [0, 0, 0, 0, 200, 800]


class Node(torch.autograd.Function):
    """The identity, whose node in the graph holds a token."""

    @staticmethod
    def forward(ctx, x, token):
        ctx.token = token
        return x.clone()

    @staticmethod
    def backward(_, gradient):
        return gradient, None


class Token:
    pass


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu", init_scale=4.0)])
def test_a_lazy_loss_itself_is_gone_before_the_next_is_asked_for(scaler):
    p, tokens = parameter(1.0), []

    def objectives():
        for _ in range(3):
            assert all(token() is None for token in tokens)
            token = Token()
            tokens.append(weakref.ref(token))
            yield Node.apply(p, token).sum()
            del token

    LossGradients().add(objectives(), [p], scaler)
    assert len(tokens) == 3


def test_a_lazy_objective_may_use_backward_for_its_own_purposes():
    p, x = parameter(2.0), parameter(3.0)

    def objectives():
        yield (5.0 * p).sum()
        (p * x).sum().backward()  # an attack: leaves gradients on the parameters
        adversarial = (x + x.grad.sign()).detach()
        yield (p * adversarial).sum()

    collected = taken(objectives(), p)
    assert [float(g[p]) for g in collected.gradients] == [5.0, 4.0]


def test_other_leaves_get_their_gradient_as_usual():
    p, x = parameter(2.0), parameter(3.0)
    x.grad = torch.tensor([100.0])
    taken([(p * x).sum(), (p * x).sum()], p)
    assert x.grad.tolist() == [104.0]


def test_a_view_is_taken_as_a_copy():
    p = parameter(1.0, 2.0)
    bucket = torch.zeros(4)

    def into_bucket(parameter):
        bucket[:2] = parameter.grad
        parameter.grad = bucket[:2]

    p.register_post_accumulate_grad_hook(into_bucket)
    collected = taken([linear(([1.0, 2.0],), p), linear(([3.0, 4.0],), p)], p)
    assert [g[p].tolist() for g in collected.gradients] == [[1, 2], [3, 4]]


def test_a_lazily_conjugated_gradient_is_taken_as_plain_numbers():
    p = parameter(1 + 1j, 2 - 1j, dtype=torch.complex64)
    factors = torch.tensor([1 + 2j, 3 - 4j])
    collected = taken([(p.conj() * factors).real.sum()], p)
    gradient = collected.gradients[0][p]
    assert_close(torch.view_as_real(gradient), torch.view_as_real(factors))


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        ([], ValueError, "at least one scalar tensor, got none"),
        (iter([]), ValueError, "at least one scalar tensor, got none"),
        (torch.zeros(0), ValueError, "at least one scalar tensor, got none"),
        (
            torch.ones((), requires_grad=True),
            TypeError,
            "iterable of scalar tensors, got one 0-dim",
        ),
        (1.0, TypeError, "iterable of scalar tensors, got float"),
        (None, TypeError, "iterable of scalar tensors, got NoneType"),
        ([1.0], TypeError, r"losses\[0\] must be a scalar tensor, got float"),
        ({"a": 1}, TypeError, r"got a dict: give its values\(\)"),
        ([torch.ones(3, requires_grad=True)], ValueError, r"losses\[0\] .* shape \(3,\)"),
        ([torch.ones(0, requires_grad=True)], ValueError, r"losses\[0\] .* shape \(0,\)"),
        (torch.ones(1, 2, requires_grad=True), ValueError, r"losses\[0\] .* shape \(2,\)"),
        ([torch.ones(())], ValueError, r"losses\[0\] has no graph"),
    ],
)
def test_what_is_no_iterable_of_scalars_with_graphs_is_refused(losses, error, message):
    with pytest.raises(error, match=f"losses.*{message}" if "losses" not in message else message):
        taken(losses, parameter(1.0))


def test_the_loss_at_fault_is_named():
    p = parameter(1.0)
    for bad, error, message in (
        (p.detach().sum(), ValueError, r"losses\[1\] has no graph"),
        (p.expand(2), ValueError, r"losses\[1\] must be a scalar, got shape \(2,\)"),
        ("loss", TypeError, r"losses\[1\] must be a scalar tensor, got str"),
        (parameter(1.0).sum(), ValueError, r"losses\[1\] reaches none of the .* parameters"),
    ):
        for losses in ([p.sum(), bad], iter([p.sum(), bad])):
            with pytest.raises(error, match=message):
                taken(losses, p)


def test_a_loss_of_one_element_counts_as_a_scalar():
    p = parameter(2.0)
    collected = taken([p * 3], p)
    assert collected.losses[0].shape == ()
    assert collected.gradients[0][p].tolist() == [3]


def test_sparse_gradients_are_refused_by_name():
    p, table = parameter(1.0), torch.nn.Embedding(5, 2, sparse=True)
    with pytest.raises(ValueError, match=r"losses\[1\] .* parameter 1 of shape \(5, 2\) .*sparse"):
        taken([p.sum(), table(torch.tensor([1, 3])).sum()], p, table.weight)


@pytest.mark.parametrize(("losses", "found"), [(3, "more"), (1, "1")])
@pytest.mark.parametrize("kind", [list, iter])
def test_every_micro_batch_has_as_many_losses(losses, found, kind):
    p = parameter(1.0)
    collected = taken([p.sum(), p.sum()], p)
    with pytest.raises(ValueError, match=f"losses must be 2 as in the micro-batch .* got {found}"):
        collected.add(kind([p.sum() for _ in range(losses)]), [p], None)


@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_each_retains_the_graphs_of_a_sequence_up_to_the_last(kind):
    p = parameter(1.0)
    retained = [retain for _, retain in each(kind([p.sum(), p.sum(), p.sum()]))]
    assert retained == ([False] * 3 if kind is iter else [True, True, False])


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_combine_is_the_weighted_sum_over_the_losses_that_reach_a_parameter():
    p, q, r = parameter(0.0, 0.0), parameter(0.0), parameter(0.0)
    gradients = [
        {p: torch.tensor([1.0, 2.0]), q: torch.tensor([3.0])},
        {p: torch.tensor([10.0, 20.0])},
        {p: torch.tensor([100.0, 200.0]), r: torch.tensor([5.0])},
    ]
    combined = combine(gradients, doubles(1, -2, 0.5))
    assert combined.keys() == {p, q, r}
    assert combined[p].tolist() == [31, 62]
    assert combined[q].tolist() == [3]
    assert combined[r].tolist() == [2.5]


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
)
def test_combine_keeps_the_parameters_dtype(dtype):
    p = parameter(0.0, dtype=dtype)
    ones = [{p: torch.ones(1, dtype=dtype)} for _ in range(2)]
    combined = combine(ones, doubles(0.25, 0.5))[p]
    assert_close(combined, torch.full((1,), 0.75, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_combine_does_not_round_the_weights_to_the_gradients_dtype(dtype):
    p = parameter(0.0, 0.0, dtype=dtype)
    # 1e5 is beyond float16, and 1e5 · 1e-4 is not.
    gradient = torch.tensor([0.0, 1e-4], dtype=dtype)
    combined = combine([{p: gradient.clone()}, {p: gradient.clone()}], doubles(1e5, 1e5))[p]
    assert_close(combined, torch.tensor([0.0, 20.0], dtype=dtype), rtol=0.01, atol=0)


@pytest.mark.parametrize("weight", [1e60, -1e60])
def test_combine_of_a_zero_gradient_and_any_weight_is_zero(weight):
    p = parameter(0.0)
    for weights in (doubles(1, weight), doubles(weight, 1)):
        assert combine([{p: torch.zeros(1)}, {p: torch.zeros(1)}], weights)[p].tolist() == [0]


def test_an_iterator_whose_losses_share_a_graph_is_explained():
    p = parameter(1.0, 2.0)
    shared = p.square()
    with pytest.raises(RuntimeError, match=r"losses\[1\] shares its graph .* give backward\(\) a"):
        taken((loss for loss in (shared.sum(), shared.mean())), p)


def test_other_errors_of_a_backward_pass_are_left_as_they_are():
    p = parameter(1.0)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("my own trouble")

    with pytest.raises(RuntimeError, match="my own trouble"):
        taken([p.sum(), Fails.apply(p)], p)
