"""Verifiers from elsewhere confirm verdicts from here, and contradict none."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robust_app.examination import Examination
from robust_app.exchange.export import export
from tests.robust_app.exchange.outside_verifiers import COMMANDS, command, comparisons

VERIFIERS = [
    pytest.param(
        verifier,
        marks=pytest.mark.skipif(not command(verifier), reason=f"{verifier} is not installed"),
    )
    for verifier in COMMANDS
]
BOTH_CERTIFY, BOTH_FALSIFY = ("certified",) * 2, ("falsified",) * 2
CONTRADICTIONS = {("certified", "falsified"), ("falsified", "certified")}


def counted(verifier, folder):
    """How many properties have which verdicts, here and there."""
    return Counter((ours, theirs) for _, ours, theirs in comparisons(verifier, folder))


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    """Of a small dense network, with verdicts that are exact and of both kinds."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for batch in torch.randint(len(digits.x_train), (100, 64)):
        optimizer.zero_grad()
        F.cross_entropy(network(digits.x_train[batch] / 255), digits.y_train[batch]).backward()
        optimizer.step()
    how = Examination(0.05, pgd_steps=20, pgd_restarts=1, verifiers=("exact",))
    out = tmp_path_factory.mktemp("dense") / "out"
    _, counts = export(network.eval(), digits, range(12), how, 0, out, lambda _: None)
    assert counts["certified"] >= 3
    assert counts["falsified"] >= 3
    return out


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_exact_verdicts_are_confirmed(verifier, folder):
    assert set(counted(verifier, folder)) == {BOTH_CERTIFY, BOTH_FALSIFY}


@pytest.mark.slow
@pytest.mark.skipif(not command("vibecheck"), reason="vibecheck is not installed")
def test_certificates_of_a_convolutional_network_are_confirmed(robust_app, tmp_path):
    assert robust_app("train", "--epochs", "20", "--run-dir", "run")[0] == 0
    options = ("--images", "4", "--time-limit", "120", "--out", "out")
    assert robust_app("export", "run", *options)[0] == 0
    counts = counted("vibecheck", tmp_path / "out")
    assert counts[BOTH_CERTIFY] >= 1
    assert not CONTRADICTIONS & counts.keys()
