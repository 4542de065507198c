"""The table of verifiers: one signature for all of them."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robust_app.certificates import certified
from robust_app.errors import UserError
from robust_app.evaluation import evaluate
from robust_app.layer_rules import UnsupportedLayer
from robust_app.verifiers import VERIFIERS, parse

pytest.importorskip("scipy")  # of the verifier exact

# Each proves what those before it in the line prove.
LINES = [
    ("ibp", "crown-ibp", "crown", "alpha-crown", "exact"),
    ("crown-ibp", "alpha-crown-ibp", "alpha-crown"),
]


def problem(seed: int) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.rand(12, 1, 2, 2)
    return network.eval(), x, network(x).argmax(1)


@given(seed=st.integers(0, 1000), epsilon=st.sampled_from([0.0, 0.02, 0.05, 0.1]))
@settings(max_examples=6)
def test_verdicts_have_one_form_and_grow_along_the_lines(seed, epsilon):
    network, x, labels = problem(seed)
    verdicts = {
        name: verifier.decide(network, x, labels, epsilon, 10.0)
        for name, verifier in VERIFIERS.items()
    }
    for name, verdict in verdicts.items():
        for part in verdict:
            assert (part.dtype, part.shape) == (torch.bool, (12,)), name
        assert not (verdict.certified & verdict.falsified).any()
        if name != "exact":
            assert not verdict.falsified.any()  # bounds find no counterexample
    for line in LINES:
        for weaker, stronger in itertools.pairwise(line):
            assert (verdicts[weaker].certified <= verdicts[stronger].certified).all()
    complete = verdicts["exact"]
    assert (complete.certified | complete.falsified).all()


def test_ibp_is_the_certificate_of_the_bounds():
    network, x, labels = problem(0)
    found = VERIFIERS["ibp"].decide(network, x, labels, 0.05, 0.0).certified
    assert torch.equal(found, certified(network, x, labels, 0.05))
    assert 0 < found.sum() < 12  # else this test shows nothing


def test_exact_says_nothing_where_its_time_is_up():
    """What neither an attack nor bounds settle needs the time that is not given."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 60), nn.ReLU(), nn.Linear(60, 60))
    network.extend([nn.ReLU(), nn.Linear(60, 5)]).eval()
    x = torch.rand(20, 1, 4, 4)
    labels = network(x).argmax(1)
    found, falsified = VERIFIERS["exact"].decide(network, x, labels, 0.05, 0.0)
    undecided = ~(found | falsified)
    assert undecided.any()
    bounds = VERIFIERS["alpha-crown"].decide(network, x, labels, 0.05, 0.0).certified
    assert not (bounds & undecided).any()


@pytest.mark.parametrize("name", VERIFIERS)
def test_a_layer_without_a_rule_is_refused_in_one_line(name):
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2))
    arguments = (network, torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64), 0.1)
    with pytest.raises(UnsupportedLayer, match="GELU") as error:
        evaluate(*arguments, verifiers=[name], pgd_steps=1, pgd_restarts=1, seed=0)
    assert isinstance(error.value, UserError)  # which the command line reports with status 2
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in VERIFIERS if name != "ibp"])
def test_linear_bounds_refuse_more_layers_than_intervals(name):
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2))
    x, labels = torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
    VERIFIERS["ibp"].decide(network, x, labels, 0.1, 1.0)
    with pytest.raises(UnsupportedLayer, match="Sigmoid"):
        VERIFIERS[name].decide(network, x, labels, 0.1, 1.0)


def test_a_cascade_is_read_from_names_with_commas():
    assert parse("ibp") == ("ibp",)
    assert parse("ibp, crown-ibp,exact") == ("ibp", "crown-ibp", "exact")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("ipb", r"^unknown verifier 'ipb'; the nearest known is 'ibp'$"),
        ("ibp,crwon", r"^unknown verifier 'crwon'; the nearest known is 'crown'$"),
        ("ibp,", r"^unknown verifier ''"),
        ("", r"^unknown verifier ''"),
    ],
)
def test_an_unknown_verifier_names_the_nearest(names, message):
    with pytest.raises(UserError, match=message):
        parse(names)


def test_every_verifier_is_described():
    for verifier in VERIFIERS.values():
        assert 0 < len(verifier.description) < 80
