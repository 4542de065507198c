"""State, copies, hooks: what a user of torch.optim expects of any optimizer."""

import copy
import io
import pickle
from collections import defaultdict

import pytest
import torch
from torch import Tensor, nn

from mogd import Fixed, UnbiasedMultiGradient


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def objectives(model: nn.Module, step: int):
    """Two losses of one batch that cannot both be met."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, generator=generator)
    yield (model(x) - x[:, :2]).square().mean()
    yield (model(x) + 2 * x[:, 1:]).square().mean()


def adam(model: nn.Module, **options) -> UnbiasedMultiGradient:
    return UnbiasedMultiGradient(
        model.parameters(), torch.optim.Adam, priority=Fixed(1), lr=0.05, **options
    )


def train(model: nn.Module, optimizer: UnbiasedMultiGradient, steps: range = range(3)) -> None:
    for step in steps:
        optimizer.step(lambda step=step: objectives(model, step))


def trained(**options) -> tuple[nn.Module, UnbiasedMultiGradient]:
    model = network()
    optimizer = adam(model, **options)
    train(model, optimizer)
    return model, optimizer


def leaves(tree) -> list:
    """Tensors and numbers of a state dict in order, with their keys."""
    if isinstance(tree, dict):
        return [x for key, value in tree.items() for x in (key, *leaves(value))]
    if isinstance(tree, list | tuple):
        return [x for value in tree for x in leaves(value)]
    return [tree]


def same(tree, other) -> bool:
    ours, others = leaves(tree), leaves(other)
    return len(ours) == len(others) and all(
        a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(ours, others, strict=True)
    )


def assert_shared(optimizer: UnbiasedMultiGradient) -> None:
    """Groups, state and defaults are the very objects the base works with."""
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.state is optimizer.base.state
    assert optimizer.defaults is optimizer.base.defaults


def assert_same_future(model, optimizer, other_model, other) -> None:
    train(model, optimizer, range(3, 6))
    train(other_model, other, range(3, 6))
    for parameter, twin in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(parameter, twin)
    assert same(optimizer.state_dict(), other.state_dict())


def through_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_hundred_round_trips_keep_the_bits():
    model, optimizer = trained()
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    for _ in range(100):
        optimizer = adam(model)
        optimizer.load_state_dict(through_file(state))
        state = optimizer.state_dict()
    assert same(state, before)
    assert_shared(optimizer)


def test_load_before_any_backward_resumes():
    model, optimizer = trained()
    resumed = network(seed=1)
    resumed.load_state_dict(model.state_dict())
    again = adam(resumed)
    again.load_state_dict(through_file(optimizer.state_dict()))
    assert_shared(again)
    assert_same_future(model, optimizer, resumed, again)


def test_load_over_another_history_forgets_it():
    model, optimizer = trained()
    resumed = network(seed=1)
    again = adam(resumed)
    train(resumed, again, range(20, 25))
    resumed.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same_future(model, optimizer, resumed, again)


def test_loaded_moments_are_a_copy():
    model, optimizer = trained()
    again = adam(network())
    again.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(again.state_dict()["moments"])
    train(model, optimizer, range(3, 5))
    assert same(again.state_dict()["moments"], before)


def test_untrained_state_loads():
    fresh = adam(network())
    assert fresh.state_dict()["moments"] is None
    model, optimizer = trained()
    optimizer.load_state_dict(fresh.state_dict())
    record = optimizer.backward(objectives(model, 0))
    assert record.weights.tolist() == [0.5, 0.5]


def test_state_dict_is_data_alone():
    _, optimizer = trained()
    kinds = {type(leaf) for leaf in leaves(optimizer.state_dict())}
    assert kinds <= {str, int, float, bool, type(None), Tensor}


def test_skipped_and_decays_are_restored():
    model = network()
    optimizer = adam(model, nonfinite="skip", moment_decay=(0.3, 0.6))
    optimizer.step(lambda: [loss / 0 for loss in objectives(model, 0)])
    train(model, optimizer)
    again = adam(model, nonfinite="skip")
    again.load_state_dict(through_file(optimizer.state_dict()))
    assert again.skipped == 1
    assert again.moment_decay == (0.3, 0.6)
    again.step(lambda: [loss / 0 for loss in objectives(model, 0)])
    assert (again.skipped, optimizer.skipped) == (2, 1)


@pytest.mark.parametrize("pending", [False, True])
def test_deepcopy_of_model_and_optimizer_keeps_the_links(pending):
    model, optimizer = trained()
    if pending:
        with optimizer.accumulate():
            optimizer.backward(objectives(model, 7))
    other_model, other = copy.deepcopy((model, optimizer))
    assert_shared(other)
    assert other.param_groups[0]["params"][0] is other_model[0].weight
    if pending:
        optimizer.backward(objectives(model, 8))
        other.backward(objectives(other_model, 8))
        optimizer.step()
        other.step()
    assert_same_future(model, optimizer, other_model, other)


def test_deepcopy_alone_leaves_the_original():
    model, optimizer = trained()
    other = copy.deepcopy(optimizer)
    before = copy.deepcopy(other.state_dict())
    train(model, optimizer, range(3, 6))
    assert same(other.state_dict(), before)
    assert_shared(other)
    copied = other.param_groups[0]["params"][0]
    assert copied is not model[0].weight
    other.backward([p.square().sum() + copied.sum() for p in other.param_groups[0]["params"][:2]])
    other.step()
    assert not torch.equal(copied, model[0].weight)


def torch_copy(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [lambda thing: pickle.loads(pickle.dumps(thing)), torch_copy])
def test_pickle_of_model_and_optimizer_keeps_the_links(copied):
    model, optimizer = trained()
    other_model, other = copied((model, optimizer))
    assert_shared(other)
    assert (other.moment_decay, other.nonfinite, other.priority) == ((0.9, 0.99), "raise", Fixed(1))
    assert same(vars(other.last), vars(optimizer.last))
    assert_same_future(model, optimizer, other_model, other)


def test_copies_have_working_hooks():
    """Torch drops hooks from copies, but a copy must accept new ones."""
    model, optimizer = trained()
    other_model, other = copy.deepcopy((model, optimizer))
    calls = []
    other.register_step_post_hook(lambda *args: calls.append(args[0]))
    train(other_model, other, range(1))
    assert calls == [other]


def test_step_hooks():
    model, optimizer = trained()
    calls = []
    optimizer.register_step_pre_hook(lambda ours, args, kwargs: calls.append(("pre", ours)))
    optimizer.register_step_post_hook(lambda ours, args, kwargs: calls.append(("post", ours)))
    optimizer.backward(objectives(model, 0))
    optimizer.step()
    assert calls == [("pre", optimizer), ("post", optimizer)]


def test_step_hook_may_replace_the_closure():
    model, optimizer = trained()
    seen = []

    def replace(ours, args, kwargs):
        return (ours, lambda: seen.append(1) or objectives(model, 0)), kwargs

    optimizer.register_step_pre_hook(replace)
    optimizer.step(None)
    assert seen == [1]


def test_state_dict_hooks_see_the_whole_state():
    _, optimizer = trained()
    calls = []
    optimizer.register_state_dict_pre_hook(lambda ours: calls.append(("pre", ours)))

    def note(ours, state_dict):
        calls.append(("post", ours, sorted(state_dict)))

    optimizer.register_state_dict_post_hook(note)
    optimizer.register_state_dict_post_hook(lambda ours, state_dict: state_dict | {"note": 1})
    state = optimizer.state_dict()
    entries = ["moment_decay", "moments", "param_groups", "skipped", "state"]
    assert calls == [("pre", optimizer), ("post", optimizer, entries)]
    assert state["note"] == 1


def test_load_state_dict_hooks_see_the_whole_state():
    _, optimizer = trained()
    again = adam(network())
    calls = []

    def revise(ours, state_dict):
        calls.append(("pre", ours))
        return state_dict | {"moment_decay": [0.25, 0.5], "skipped": 7}

    def look(ours):
        calls.append(("post", ours))
        assert_shared(ours)
        assert same(ours.state_dict()["moments"], optimizer.state_dict()["moments"])

    again.register_load_state_dict_pre_hook(revise)
    again.register_load_state_dict_post_hook(look)
    given = optimizer.state_dict()
    again.load_state_dict(given)
    assert calls == [("pre", again), ("post", again)]
    assert (again.moment_decay, again.skipped) == ((0.25, 0.5), 7)
    assert given["skipped"] == 0  # the caller's own


def test_load_hook_may_not_write_into_the_callers_state():
    _, optimizer = trained()
    again = adam(network())
    again.register_load_state_dict_pre_hook(lambda ours, state: state.update(skipped=7))
    given = optimizer.state_dict()
    again.load_state_dict(given)
    assert (again.skipped, given["skipped"]) == (7, 0)


def foreign_states():
    _, optimizer = trained()
    state = optimizer.state_dict()
    moments = state["moments"]
    wide = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    other = adam(wide)
    train(wide, other)
    short = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False))
    fewer = adam(short)
    train(short, fewer)
    deeper = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Linear(2, 2))
    more = adam(deeper)
    train(deeper, more)
    shallow = network()
    descent = UnbiasedMultiGradient(shallow.parameters(), lr=0.1, momentum=0.9)
    train(shallow, descent)
    plain = network()
    settled = UnbiasedMultiGradient(plain.parameters(), lr=0.1)  # no state that Adam would miss
    train(plain, settled)
    return {
        "base alone": (optimizer.base.state_dict(), r"lacks \['moment_decay', 'moments', 'skipped"),
        "other shapes": (other.state_dict(), r"parameter 0 has shape \(2, 5, 3\).*\(2, 4, 3\)"),
        "more parameters": (more.state_dict(), "has parameter 4.* only 4"),
        "fewer parameters": (fewer.state_dict(), "doesn't match the size"),
        "another base": (descent.state_dict(), "damaged, or not of Adam: it lacks 'step'"),
        "another base without state": (
            settled.state_dict(),
            r"of another base, .*: its param_groups lack options of Adam, \[.*'betas'.*\] \(add",
        ),
        "other groups": (
            state | {"param_groups": state["param_groups"] * 2},
            "different number of parameter groups",
        ),
        "no norms": (
            state | {"moments": {k: v for k, v in moments.items() if k != "norms"}},
            r"lacks \['norms'\]",
        ),
        "other K": (
            state | {"moments": moments | {"norms": torch.ones(3, dtype=torch.float64)}},
            r"'late' of shape \(2,\), expected \(3,\)",
        ),
        "no moments": (state | {"moments": 3}, "state_dict is damaged, .*'int'"),
        "no tensor": (state | {"moments": moments | {"count": 5}}, "state_dict is damaged, "),
        "no number": (state | {"skipped": [1, 2]}, "state_dict is damaged, "),
        "no groups": (state | {"param_groups": 3}, "state_dict is damaged, "),
    }


def test_an_option_that_the_groups_lacked_before_is_not_asked_of_a_state():
    optimizer = UnbiasedMultiGradient(network().parameters(), lr=0.1)
    optimizer.defaults["of a version to come"] = 1
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    "kind",
    [
        "base alone",
        "other shapes",
        "more parameters",
        "fewer parameters",
        "another base",
        "another base without state",
        "other groups",
        "no norms",
        "other K",
        "no moments",
        "no tensor",
        "no number",
        "no groups",
    ],
)
def test_foreign_state_is_refused_with_nothing_changed(kind):
    state, message = foreign_states()[kind]
    model, optimizer = trained()
    twin_model, twin = trained()
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert_shared(optimizer)
    assert_same_future(model, optimizer, twin_model, twin)


def test_named_parameters():
    model, twin = network(), network()
    optimizer = UnbiasedMultiGradient(model.named_parameters(), torch.optim.Adam, lr=0.05)
    plain = UnbiasedMultiGradient(twin.parameters(), torch.optim.Adam, lr=0.05)
    train(model, optimizer)
    train(twin, plain)
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    plain.load_state_dict(through_file(optimizer.state_dict()))
    assert_same_future(model, optimizer, twin, plain)


def test_added_group_is_the_bases_and_is_saved():
    model, optimizer = trained()
    extra = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    assert_shared(optimizer)
    optimizer.step(lambda: [loss * extra.prod() for loss in objectives(model, 3)])
    assert (extra != 1).all()

    resumed = network()
    again = adam(resumed)
    again.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    again.load_state_dict(optimizer.state_dict())
    assert same(again.state_dict(), optimizer.state_dict())
    assert again.param_groups[1]["lr"] == 0.5


def test_a_group_that_is_taken_away_is_in_no_state():
    """Of a base without state: torch's own do not save one for what is gone."""
    model = network()
    groups = [{"params": layer.parameters()} for layer in (model[0], model[2])]
    optimizer = UnbiasedMultiGradient(groups, lr=0.05)
    train(model, optimizer)
    whole = optimizer.state_dict()["moments"]["exp_avg"]
    taken = optimizer.param_groups.pop()
    saved = optimizer.state_dict()
    assert list(saved["moments"]["exp_avg"]) == [0, 1]
    resumed = UnbiasedMultiGradient(network()[0].parameters(), lr=0.05)
    resumed.load_state_dict(saved)
    assert same(resumed.state_dict(), saved)
    optimizer.param_groups.append(taken)  # and it is back, moments and all
    assert same(optimizer.state_dict()["moments"]["exp_avg"], whole)
    del optimizer.param_groups[1]
    again = copy.deepcopy(model)
    resumed = UnbiasedMultiGradient(again[0].parameters(), lr=0.05)
    resumed.load_state_dict(saved)
    for module, goes_on in ((model, optimizer), (again, resumed)):
        train(module, goes_on)
    assert same(list(again.parameters()), list(model.parameters()))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    model, optimizer = trained()
    optimizer.backward(objectives(model, 0))
    optimizer.zero_grad(set_to_none)
    gradients = [parameter.grad for parameter in model.parameters()]
    if set_to_none:
        assert gradients == [None] * 4
    else:
        assert not any(gradient.any() for gradient in gradients)
    optimizer.backward(objectives(model, 0))
    assert all(parameter.grad.any() for parameter in model.parameters())
    assert_shared(optimizer)


def test_zero_grad_drops_what_was_accumulated():
    model, optimizer = trained()
    twin_model, twin = trained()
    with optimizer.accumulate():
        optimizer.backward(objectives(model, 9))
    optimizer.zero_grad()
    assert_same_future(model, optimizer, twin_model, twin)


def test_load_drops_what_was_accumulated_or_skipped():
    model, optimizer = trained(nonfinite="skip")
    twin_model, twin = trained(nonfinite="skip")
    state = copy.deepcopy(optimizer.state_dict())
    with optimizer.accumulate():
        optimizer.backward(objectives(model, 9))
    optimizer.load_state_dict(state)
    optimizer.backward(objectives(model, 3))
    optimizer.step()
    twin.backward(objectives(twin_model, 3))
    twin.step()
    assert same(optimizer.state_dict(), twin.state_dict())


def test_repr_and_profiler_name():
    _, optimizer = trained()
    assert repr(optimizer).startswith("UnbiasedMultiGradient(rule=BisectorProjection(")
    assert f", moment_decay={optimizer.moment_decay}, nonfinite=" in repr(optimizer)
    assert repr(optimizer).endswith(f"base={optimizer.base!r})")
    with torch.profiler.profile() as profile:
        optimizer.step()
    names = {event.key for event in profile.key_averages()}
    assert "Optimizer.step#UnbiasedMultiGradient.step" in names


@pytest.mark.parametrize("seed", range(8))
def test_resume_keeps_the_bits_where_losses_touch_different_parameters(seed):
    def start():
        torch.manual_seed(seed)
        parameters = [torch.nn.Parameter(torch.randn(50, dtype=torch.float64)) for _ in range(4)]
        return parameters, UnbiasedMultiGradient(parameters, lr=0.1)

    def step(parameters, optimizer):
        first, second, third, fourth = parameters
        optimizer.step(
            lambda: [
                (first - fourth).square().sum() + fourth.sum(),
                (second.sin() * third).sum() + (fourth - 1).square().sum(),
            ]
        )
        return optimizer.last

    parameters, optimizer = start()
    for _ in range(3):
        step(parameters, optimizer)
    again, resumed = start()
    for one, other in zip(parameters, again, strict=True):
        other.data.copy_(one.data)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(5):
        one, other = step(parameters, optimizer), step(again, resumed)
        assert torch.equal(one.gramian, other.gramian)
        assert torch.equal(one.weights, other.weights)


def test_there_is_no_record_of_a_step_that_another_optimizer_took():
    model, optimizer = trained()
    assert optimizer.last is not None
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.last is None
    optimizer.backward([loss.sum() for loss in (model[0].weight, model[0].bias)])
    assert optimizer.last is not None


class Plain(torch.optim.Optimizer):
    """As those of users: without options that torch's own have."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        raise NotImplementedError


@pytest.mark.parametrize("copied", [lambda optimizer: optimizer, copy.deepcopy])
def test_an_option_that_torch_adds_to_any_base_is_not_asked_of_a_state(copied):
    one, other = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    both = UnbiasedMultiGradient([{"params": [one]}, {"params": [other]}], Plain, lr=0.1)
    late = copied(UnbiasedMultiGradient([one], Plain, lr=0.1))
    late.add_param_group({"params": [other]})
    late.load_state_dict(both.state_dict())


def test_wrapping_leaves_the_defaults_of_the_base():
    base = UnbiasedMultiGradient([torch.nn.Parameter(torch.ones(1))], Plain, lr=0.1).base
    assert base.defaults == {"lr": 0.1}


def test_groups_and_state_stay_the_bases_whoever_replaces_them():
    model, optimizer = trained()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.base.load_state_dict(optimizer.base.state_dict())
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.state is optimizer.base.state
    train(model, optimizer)
    scheduler.step()
    assert optimizer.base.param_groups[0]["lr"] == 0.025
    optimizer.state = defaultdict(dict)
    assert not optimizer.base.state
    optimizer.defaults = {"lr": 1.0}
    assert optimizer.base.defaults == {"lr": 1.0}
    optimizer.param_groups = optimizer.param_groups[:0]
    assert optimizer.base.param_groups == []


def test_a_group_added_twice_is_refused():
    _, optimizer = trained()
    group = {"params": [nn.Parameter(torch.zeros(2))]}
    optimizer.add_param_group(group)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group(group)


class Delegating(torch.optim.Optimizer):
    """A base whose groups and state are those of another and cannot be set."""

    param_groups = property(lambda self: self.inner.param_groups)
    state = property(lambda self: self.inner.state)
    defaults = property(lambda self: self.inner.defaults)

    def __init__(self, params, **options) -> None:
        self.inner = torch.optim.SGD(params, **options)

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state_dict) -> None:
        self.inner.load_state_dict(state_dict)

    def step(self) -> None:
        self.inner.step()


def test_a_base_that_delegates_says_itself_why_it_refuses_a_state():
    model = network()
    optimizer = UnbiasedMultiGradient(model.parameters(), Delegating, lr=0.1)
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(state | {"param_groups": state["param_groups"] * 2})
