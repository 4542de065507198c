"""The recipes of docs/trainers.md train as plain loops do: the code of the page itself is run."""

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from mogd import UnbiasedMultiGradient

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
SHARED, *SECTIONS = PAGE.read_text(encoding="utf-8").split("\n## ")
RECIPES = {section.partition("\n")[0]: section for section in SECTIONS}
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
TESTED = ("Plain torch", "Lightning", "Accelerate")

lightnings_warnings = (
    # Of Lightning's own code, with a new torch:
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning",
    # On machines with many cores, or a GPU:
    "ignore:The 'train_dataloader' does not have many workers:UserWarning",
    "ignore:GPU available but not used:UserWarning",
)


def code_of(*parts, **changes):
    """The code of parts of the page, with some of it replaced."""
    code = "".join("\n".join(re.findall(r"```python\n(.*?)```", part, re.S)) for part in parts)
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    return code


def run(*parts, **changes):
    """Execute it; returns the names that it leaves."""
    names = {"__name__": "page"}
    exec(compile(code_of(*parts, **changes), str(PAGE), "exec"), names)
    return names


def plain(epochs, size=16, micro_batches=1, dtype=None, each_step=False):
    """What the recipes do, in the plainest way; returns the model and the optimizer."""
    page = run(SHARED)
    model = page["network"]()
    optimizer = UnbiasedMultiGradient(model.parameters(), torch.optim.Adam, lr=1e-2)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    batches = list(zip(*(part.split(size) for part in page["data"].tensors), strict=True))

    def losses(x, y):
        with nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype):
            outputs = model(x)
        both = page["losses"](lambda _: outputs.float(), x, y)
        return [loss / micro_batches for loss in both]

    for _ in range(epochs):
        for first in range(0, len(batches), micro_batches):
            *inner, last = batches[first : first + micro_batches]
            optimizer.zero_grad()
            with optimizer.accumulate():
                for batch in inner:
                    optimizer.backward(losses(*batch))
            optimizer.backward(losses(*last))
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if each_step:
                scheduler.step()
        if not each_step:
            scheduler.step()
    return model, optimizer


def assert_same_bits(model, expected):
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def assert_near(model, expected, part):
    """As far apart as this part of the way from the start, at most."""
    vector = nn.utils.parameters_to_vector
    start, end = vector(run(SHARED)["network"]().parameters()), vector(expected.parameters())
    assert (vector(model.parameters()) - end).norm() < part * (end - start).norm()


def assert_same_moments(optimizer, expected):
    ours, theirs = (each.state_dict()["moments"] for each in (optimizer, expected))
    for key in ("count", "norms", "gramian"):
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)


def test_every_recipe_of_the_page_is_tested():
    assert tuple(RECIPES) == TESTED


def test_plain_torch_with_float16_and_micro_batches_trains_as_float32_and_whole_batches():
    page = run(SHARED, RECIPES["Plain torch"])
    expected, optimizer = plain(epochs=2, size=32)
    assert page["optimizer"].state_dict()["moments"]["count"] == 4
    assert page["scheduler"].get_last_lr() == [0.0025]
    assert_near(page["model"], expected, part=0.02)
    norms = page["optimizer"].state_dict()["moments"]["norms"]
    torch.testing.assert_close(norms, optimizer.state_dict()["moments"]["norms"], rtol=0.1, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings(*lightnings_warnings)
def test_lightning_trains_to_the_same_bits_and_resumes_with_the_moments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = run(SHARED, RECIPES["Lightning"])
    two, optimizer = plain(epochs=2)
    trainer = page["trainer"]
    assert_same_bits(trainer.lightning_module.model, two)
    [inside] = trainer.optimizers
    assert_same_moments(inside, optimizer)
    assert trainer.global_step == 8
    assert trainer.callback_metrics["cosine"] == inside.last.cosines[0, 1]
    four, optimizer = plain(epochs=4)
    assert_same_bits(page["resumed"].model, four)
    assert_same_moments(page["resumed"].trainer.optimizers[0], optimizer)
    assert page["resumed"].lr_schedulers().get_last_lr() == [1e-2 / 16]


@pytest.mark.slow
@pytest.mark.filterwarnings(*lightnings_warnings)
def test_lightning_casts_as_autocast_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = '"precision": "bf16-mixed", "enable_model_summary": False'
    in_bf16 = {'"logger": False': options + ', "logger": False'}
    page = run(SHARED, RECIPES["Lightning"], **in_bf16)
    expected, optimizer = plain(epochs=4, dtype=torch.bfloat16)
    assert_same_bits(page["resumed"].model, expected)
    assert_same_moments(page["resumed"].trainer.optimizers[0], optimizer)


@pytest.mark.slow
@pytest.mark.filterwarnings(*lightnings_warnings)
def test_lightning_scales_in_float16_what_it_unscales(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The plugin behind precision="16-mixed", which Lightning refuses to choose on a CPU:
    plugin = (
        'lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))'
    )
    options = f'"plugins": {plugin}, "enable_model_summary": False'
    changes = {'"logger": False': options + ', "logger": False'}
    scaled = "losses(self.model, *batch), scaler=self.trainer.precision_plugin.scaler"
    page = run(SHARED, RECIPES["Lightning"], **changes, **{"losses(self.model, *batch)": scaled})
    expected, optimizer = plain(epochs=4)
    assert_near(page["resumed"].model, expected, part=0.02)
    found, wanted = (
        of.state_dict()["moments"]["norms"]
        for of in (page["resumed"].trainer.optimizers[0], optimizer)
    )
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings(*lightnings_warnings)
def test_lightnings_unaveraged_gradients_of_two_processes_are_refused(tmp_path):
    changes = {'"logger": False': '"devices": 2, "strategy": "ddp_fork", "logger": False'}
    (tmp_path / "page.py").write_text(code_of(SHARED, RECIPES["Lightning"], **changes))
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, env=ONE_THREAD, text=True, capture_output=True
    )
    assert done.returncode != 0
    assert "RuntimeError: the processes hold different gradients" in done.stderr


@pytest.mark.slow
def test_two_processes_of_accelerate_train_as_one_does(tmp_path):
    changes = {
        "    error = model(x) - y\n": "",
        "return error.square().mean(), error.abs().mean()": (
            "yield (model(x) - y).square().mean()\n    yield (model(x) - y).abs().mean()"
        ),
        "[loss / scale for loss in both]": "(loss / scale for loss in both)",
        'mixed_precision="bf16"': 'mixed_precision="no"',
        "DataLoader(data, batch_size=16), StepLR(ours, step_size=1": (
            "DataLoader(data, batch_size=8), StepLR(ours, step_size=2"
        ),
    }
    code = code_of(SHARED, RECIPES["Accelerate"], **changes)
    code += "torch.save(list(model.parameters()), f'{accelerator.process_index}.pt')\n"
    (tmp_path / "page.py").write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*torchrun, "--nproc-per-node", "2", "page.py"], cwd=tmp_path, env=ONE_THREAD, check=True
    )
    expected, _ = plain(2, micro_batches=2, each_step=True)
    for process in range(2):
        found = torch.load(tmp_path / f"{process}.pt")
        torch.testing.assert_close(found, list(expected.parameters()), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_accelerate_trains_to_the_same_bits_and_restores_the_moments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = run(SHARED, RECIPES["Accelerate"])
    alike = {"micro_batches": 2, "dtype": torch.bfloat16, "each_step": True}
    for epochs in (2, 1):  # as it ended, and as it was saved
        expected, optimizer = plain(epochs, **alike)
        assert_same_bits(page["model"], expected)
        assert_same_moments(page["ours"], optimizer)
        assert page["ours"].param_groups[0]["lr"] == 1e-2 / 4**epochs
        page["accelerator"].load_state("state")
    page["epoch"]()
    assert_same_bits(page["model"], plain(2, **alike)[0])
