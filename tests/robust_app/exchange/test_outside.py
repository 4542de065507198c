"""Networks of others; what the command says of them is in test_evaluate_command.py."""

import dataclasses
import math

import onnx
import pytest
import torch
from torch import nn

from robust_app import models
from robust_app.errors import UserError
from robust_app.exchange.operators import LAYERS
from robust_app.exchange.outside import check_classifies, from_file, from_function, load_weights
from robust_app.exchange.writing import to_onnx
from robust_app.layers import Normalize

FACTORY = """
import dataclasses
import helper
from torch import nn

@dataclasses.dataclass
class Size:
    hidden: int = helper.hidden

def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, Size().hidden), nn.Dropout(), nn.Linear(5, 10))

def number():
    return 3

def breaks():
    raise RuntimeError("no\\nluck")

def leaves():
    raise SystemExit(0)

def opaque():
    class Opaque(nn.Flatten):
        def forward(self, x):
            return super().forward(x.detach())
    return nn.Sequential(Opaque(), nn.Linear(64, 10)).requires_grad_(False)

def other_images():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))

def few_classes():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 9))

def pair():
    return nn.LSTM(8, 2)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with networks.py, its helper and what is no Python."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "helper.py").write_text("hidden = 5\n")
    (tmp_path / "networks.py").write_text(FACTORY)
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "notes.txt").write_text("make = print\n")
    (tmp_path / "script.py").write_text("import sys\nsys.exit(3)\n")
    return tmp_path


def test_a_function_makes_a_network_in_evaluation_mode(here, digits):
    network = from_function("networks.py:make", None, digits)
    assert not any(module.training for module in network.modules())
    assert network(digits.x_test[:3] / 255).shape == (3, 10)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("networks.py", "--model: expected FILE.py:FUNCTION, found 'networks.py'"),
        ("networks.py:", "--model: expected FILE.py:FUNCTION"),
        ("nowhere.py:make", "--model: no Python file nowhere.py"),
        ("notes.txt:make", "--model: no Python file notes.txt"),
        ("networks.py:absent", "--model: no function absent in networks.py"),
        ("networks.py:helper", "--model: no function helper in networks.py"),
        ("networks.py:number", "networks.py:number to return an nn.Module, found int"),
        ("networks.py:breaks", r"networks.py:breaks fails \(RuntimeError: no luck\)"),
        ("broken.py:make", r"broken.py fails \(ModuleNotFoundError: .*nothing_of_this_name"),
        ("networks.py:leaves", r"networks.py:leaves fails \(SystemExit: 0\)"),
        ("script.py:make", r"script.py fails \(SystemExit: 3\)"),
        ("networks.py:opaque", r"opaque: has no gradient at its images, which attacks need"),
        ("networks.py:other_images", r"other_images: does not take images of shape \(1, 8, 8\)"),
        ("networks.py:few_classes", r"at least 10 logits for each of 2 .* found \(2, 9\)"),
    ],
)
def test_what_is_no_network_for_the_images_is_refused(here, digits, where, message):
    with pytest.raises(UserError, match=message) as refused:
        from_function(where, None, digits)
    assert "\n" not in str(refused.value)


def test_a_network_of_another_kind_of_output_is_refused(digits):
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(UserError, match="found tuple"):
        check_classifies(Pair(), digits)


@pytest.mark.parametrize(
    ("number", "name", "message"),
    [
        (math.nan, "1.weight", "expected finite logits, found nan; not finite: 1.weight$"),
        (math.inf, "3.bias", "expected finite logits, found inf; not finite: 3.bias$"),
        (math.nan, "2.running_mean", "found nan; not finite: 2.running_mean$"),
        (3e38, "3.weight", "expected finite logits, found [a-z-]+$"),
    ],
)
def test_what_is_not_finite_in_a_network_is_named(digits, number, name, message):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.Linear(4, 10))
    network.state_dict()["2.bias"].fill_(100.0)  # so that 3e38 is too much
    network.state_dict()[name].fill_(number)
    with pytest.raises(UserError, match=message):
        check_classifies(network.eval(), digits)


def test_a_state_that_is_no_tensor_is_passed_over(digits):
    class Stateful(nn.Linear):
        def get_extra_state(self):
            return {"calls": 3}

    network = nn.Sequential(nn.Flatten(), Stateful(64, 10))
    nn.init.constant_(network[1].weight, math.nan)
    with pytest.raises(UserError, match=r"found nan; not finite: 1\.weight$"):
        check_classifies(network, digits)


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model", "network"])
def test_weights_are_found_below_prefixes_and_keys(tmp_path, prefix, key):
    network, other = small(), small()
    nn.init.ones_(network[0].weight)
    network[1].running_mean += 3
    state = {f"{prefix}{name}": value for name, value in network.state_dict().items()}
    torch.save(state if key is None else {"epoch": 3, key: state}, tmp_path / "w.pt")
    load_weights(other, tmp_path / "w.pt")
    for name, value in network.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_a_prefix_within_a_name_stays(tmp_path):
    network = nn.ModuleDict({"head": nn.ModuleDict({"module": nn.Linear(2, 2)})})
    torch.save(network.state_dict(), tmp_path / "w.pt")
    load_weights(network, tmp_path / "w.pt")


def save_changed(path, change):
    state = dict(small().state_dict())
    change(state)
    torch.save(state, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("0.bias"), r"w.pt: does not fit the network; missing: 0.bias$"),
        (lambda s: s.update(extra=torch.ones(1)), "not of this network: extra$"),
        (
            lambda s: s.update({"2.weight": torch.ones(2, 5)}),
            r"of another shape: 2.weight$",
        ),
        (
            lambda s: [s.pop(name) for name in list(s) if name.startswith("1.")],
            r"missing: 1.bias, 1.num_batches_tracked, 1.running_mean and 2 more$",
        ),
        (
            lambda s: s.update(name="mine"),
            r"expected a state_dict, or a dict.* found a dictionary with 'name' \(str\)$",
        ),
        (lambda s: [s.clear(), s.update(net=3)], r"found a dictionary with 'net' \(int\)$"),
        (
            lambda s: s.update({"0.weight": s["0.weight"].to(torch.int8)}),
            "no real floating-point numbers: 0.weight$",
        ),
        (
            lambda s: s.update({"2.bias": s["2.bias"].to(torch.complex64)}),
            "no real floating-point numbers: 2.bias$",
        ),
        (lambda s: s.clear(), "does not fit the network; missing: "),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, change, message):
    save_changed(tmp_path / "w.pt", change)
    network = small()
    before = [parameter.clone() for parameter in network.parameters()]
    with pytest.raises(UserError, match=message):
        load_weights(network, tmp_path / "w.pt")
    assert all(map(torch.equal, network.parameters(), before))


@pytest.mark.parametrize("content", [None, b"", b"text"])
def test_a_file_without_weights_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"w.pt: cannot be read as a state_dict") as refused:
        load_weights(small(), tmp_path / "w.pt")
    assert "\n" not in str(refused.value)


def test_a_whole_module_is_not_unpickled(tmp_path):
    torch.save(small(), tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"w.pt: cannot be read as a state_dict"):
        load_weights(small(), tmp_path / "w.pt")


@pytest.fixture
def saved(tmp_path):
    """A network for the digits and its file."""
    torch.manual_seed(0)
    network = models.build("digits-cnn", (1, 8, 8), 10, mean=[0.4], std=[0.3]).eval()
    onnx.save(to_onnx(network, (1, 8, 8)), tmp_path / "m.onnx")
    return network, tmp_path / "m.onnx"


def test_a_file_is_read_and_seen_to_compute_the_same(saved, digits):
    network, path = saved
    x = digits.x_test / 255
    torch.testing.assert_close(from_file(path, digits)(x), network(x), atol=1e-5, rtol=1e-5)


def test_a_rule_that_is_wrong_is_seen(saved, digits, monkeypatch):
    monkeypatch.setitem(LAYERS, "Relu", lambda _: nn.Tanh())
    with pytest.raises(UserError, match=r"m.onnx: the logits by ONNX Runtime and by torch differ"):
        from_file(saved[1], digits)


def test_files_of_other_networks_are_refused(saved, digits, tmp_path):
    _, path = saved
    rgb = dataclasses.replace(digits, x_test=torch.rand(3, 3, 8, 8), x_train=torch.rand(3, 3, 8, 8))
    with pytest.raises(UserError, match=r"m.onnx: takes images of shape \(1, 8, 8\)"):
        from_file(path, rgb)
    many = dataclasses.replace(digits, classes=11)
    with pytest.raises(UserError, match=r"m.onnx: expected at least 11 logits"):
        from_file(path, many)
    with pytest.raises(UserError, match=r"absent.onnx: cannot be read as ONNX"):
        from_file(tmp_path / "absent.onnx", digits)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"m.onnx: cannot be read as ONNX"):
        from_file(path, digits)


def test_normalisation_enters_as_it_was(saved, digits):
    assert isinstance(saved[0][0], Normalize)
    assert torch.allclose(
        from_file(saved[1], digits)[:2](torch.ones(1, 1, 8, 8)), torch.tensor(2.0)
    )
