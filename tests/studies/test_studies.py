"""Studies on a few digits, end to end; examples in their docstrings hold."""

import copy
import dataclasses
import doctest
import importlib
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from mogd import BisectorProjection, Fixed, UnbiasedMultiGradient
from mogd.priority import ask
from mogd.rules import conflicting
from robust_app import methods, recipes
from robust_app.batch_norm import batch_norms, clean_statistics
from robust_app.errors import UserError
from robust_app.interval import Interval
from robust_app.loading import load_network
from robust_app.losses import certified_loss
from robust_app.overrides import override, with_epochs
from robust_app.reporting import Silent
from robust_app.run_directory import RunDirectory
from robust_app.session import run
from robust_app.training import Trainer
from tests.robust_app.runs import (
    ALONE,
    SHI,
    assert_same_files,
    few_digits,
    full_strength,
    trained,
)
from tests.studies import batch_statistics, gradient_lengths, report, rounding
from tests.studies.__main__ import main, work
from tests.studies.running import Setup, VariedTrainer, carry_out, row, slug
from tests.studies.studies import STUDIES, Study
from tests.studies.variations import (
    OwnBatch,
    Variation,
    bisectors,
    changed_rules,
    shared_priorities,
    weighted_sums,
)

HERE = Path(__file__).parent
QUIET = Console(quiet=True)
SOUND = torch.ones(2, dtype=torch.bool)
OWN, OF_MOMENTS, FIRST, UNREGULARIZED = changed_rules((1, 3))
VARIATIONS = [*weighted_sums((1, 2), (2, 1)), *bisectors((1, 1), (1, 3)), OWN, OF_MOMENTS]


@pytest.mark.parametrize(
    "name", [file.stem for file in sorted(HERE.glob("[!_]*.py")) if "test" not in file.stem]
)
def test_the_examples_hold(name):
    module = importlib.import_module(f"tests.studies.{name}")
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    config = full_strength("advibp", epochs=4, pgd_steps=2)
    (folder / "start").mkdir()
    RunDirectory(folder / "start").start(config)
    trained(config, folder / "start", (4,), few_digits())
    # Few test images too:
    dataset = dataclasses.replace(
        few_digits(), x_test=few_digits().x_test[:20], y_test=few_digits().y_test[:20]
    )
    return Setup(config, (0.03, 0.06), dataset, None, folder / "runs", folder / "start")


def test_every_variation_trains_another_network_from_the_same_start(setup, tmp_path):
    study = Study("few", "digits", 1, (), VARIATIONS)
    work(study, setup, (0,), None, tmp_path, {"seed": 0})
    found = json.loads((tmp_path / "few.json").read_text())
    assert [row["name"] for row in found["rows"]] == [v.name for v in VARIATIONS]
    networks = []
    for variation in VARIATIONS:
        directory = RunDirectory(setup.folder / f"{slug(variation.name)}-seed0")
        network, epoch = load_network(directory, setup.dataset, "last")
        assert epoch == 4
        networks.append(torch.nn.utils.parameters_to_vector(network.parameters()).detach())
    start, _ = load_network(RunDirectory(setup.start), setup.dataset, "last")
    begun = torch.nn.utils.parameters_to_vector(start.parameters()).detach()
    for index, parameters in enumerate(networks):
        assert 0 < (parameters - begun).norm() < 0.5 * begun.norm()
        same = [
            other.name
            for other, found in zip(VARIATIONS[:index], networks, strict=False)
            if torch.equal(parameters, found)
        ]
        assert not same, VARIATIONS[index].name
    table = report.table(found["rows"]).splitlines()
    assert len(table) == 2 + len(VARIATIONS)
    assert "verified at 0.06" in table[0]


def test_what_is_done_is_not_done_again(setup):
    [variation] = weighted_sums((1, 5))
    assert row(setup, variation, 1) is None
    carry_out(setup, variation, 1, QUIET)
    before = {file: file.stat().st_mtime_ns for file in setup.folder.glob("*-5-seed1/*")}
    carry_out(setup, variation, 1, QUIET)
    assert {file: file.stat().st_mtime_ns for file in before if file.name != ".lock"} == {
        file: time for file, time in before.items() if file.name != ".lock"
    }
    at, further = row(setup, variation, 1)["errors"]
    assert 0 <= at["standard"] <= at["PGD"] <= at["verified"] <= further["verified"]


def test_another_configuration_in_the_same_place_is_refused(setup):
    [variation] = weighted_sums((1, 6))
    carry_out(setup, variation, 1, QUIET)
    changed = dataclasses.replace(setup, config=dataclasses.replace(setup.config, epsilon=0.02))
    with pytest.raises(UserError, match="holds another run"):
        carry_out(changed, variation, 1, QUIET)


def test_what_another_process_holds_is_left_to_it(setup):
    [variation] = weighted_sums((1, 7))
    with RunDirectory(setup.folder / "weighted-sum-1-to-7-seed1").locked():
        carry_out(setup, variation, 1, QUIET)
    assert row(setup, variation, 1) is None


def test_a_resumed_run_weighs_as_it_did(setup, tmp_path):
    whole = dataclasses.replace(setup, folder=tmp_path / "whole")
    carry_out(whole, OWN, 0, QUIET)
    broken = dataclasses.replace(setup, folder=tmp_path / "broken")
    directory, name = RunDirectory(broken.folder / f"{slug(OWN.name)}-seed0"), "last"
    config = dataclasses.replace(broken.config, seed=0, **OWN.changes)
    trainer = VariedTrainer(OWN, config, broken.dataset)
    network, _ = load_network(RunDirectory(setup.start), setup.dataset, name)
    trainer.network.load_state_dict(network.state_dict())
    directory.path.mkdir(parents=True)
    directory.start(config)
    run(trainer, directory, Silent(), 2)
    carry_out(broken, OWN, 0, QUIET)
    assert_same_files(whole.folder / directory.path.name, directory.path)


def test_runs_share_the_epochs_before_both_losses_to_the_same_bits(setup, tmp_path):
    config = dataclasses.replace(setup.config, certified_epochs=2.5, ramp_epochs=1.0)
    whole = Setup(config, (0.03,), setup.dataset, None, tmp_path / "whole")
    shared = dataclasses.replace(whole, folder=tmp_path / "shared", shared_epochs=2)
    alone, own = (
        dataclasses.replace(variation, joint=True) for variation in (*weighted_sums((1, 2)), OWN)
    )
    for setting in (whole, shared):
        carry_out(setting, alone, 0, QUIET)
        carry_out(setting, own, 0, QUIET)
    for variation in (alone, own):
        name = f"{slug(variation.name)}-seed0"
        assert_same_files(whole.folder / name, shared.folder / name)
    assert len(RunDirectory(shared.folder / "shared-seed0").metrics()) == 2
    assert not (whole.folder / "shared-seed0").exists()


def test_weights_of_the_batch_itself_are_those_of_its_gradients():
    torch.manual_seed(0)
    theta = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = UnbiasedMultiGradient([theta], lr=0.1)
    Variation("own", "own", own_batch=True).apply_to(optimizer)
    assert type(optimizer) is OwnBatch
    for _ in range(3):
        gradients = torch.randn(2, 5, dtype=torch.float64)
        record = optimizer.backward([gradient @ theta for gradient in gradients])
        gramian, norms = gradients @ gradients.T, gradients.norm(dim=1)
        expected = BisectorProjection()(gramian, norms, torch.tensor(0)).weights
        torch.testing.assert_close(record.weights, expected)
        assert record.conflict == conflicting(gramian, norms, record.prioritized)
        torch.testing.assert_close(theta.grad, expected @ gradients)
        optimizer.step()


@pytest.mark.parametrize(
    ("variation", "favoured", "regularization"),
    [(FIRST, 0, 0.5), (UNREGULARIZED, 1, 0.0)],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_differs_in_conflict_alone(variation, favoured, regularization):
    config = full_strength(**variation.changes, fosc_maximum=0.0)
    rule = methods.find(config.method).rule(config)
    optimizer = UnbiasedMultiGradient(
        [torch.nn.Parameter(torch.zeros(2))], lr=0.1, rule=rule, priority=Fixed(1)
    )
    variation.apply_to(optimizer)
    assert int(ask(optimizer.priority, torch.ones(2), SOUND)) == favoured
    assert optimizer.rule.regularization == regularization


def test_a_priority_by_lot_favours_the_first_in_its_share():
    torch.manual_seed(0)
    [variation] = shared_priorities(0.25)
    answers = torch.stack([ask(variation.priority, torch.ones(2), SOUND) for _ in range(400)])
    assert 60 < int((answers == 0).sum()) < 140


def test_the_picture_is_drawn_the_same_each_time(tmp_path):
    rows = [
        {
            "name": f"{family} {number}",
            "family": family,
            "seed": seed,
            "last_epoch": {},
            "errors": [
                {"epsilon": 0.3, "standard": 3 + seed, "PGD": 5 + seed, "verified": 9 + number},
                {"epsilon": 0.4, "standard": 3 + seed, "verified": 15 + number},
            ],
        }
        for family in ("a", "b")
        for number in (0, 1)
        for seed in (0, 1)
    ]
    report.save("picture", {}, rows, tmp_path)
    first = (tmp_path / "picture.svg").read_bytes()
    report.save("picture", {}, rows, tmp_path)
    assert (tmp_path / "picture.svg").read_bytes() == first
    assert "| a 0 | 2 | 3.50 ± 0.71 | 5.50 ± 0.71 | 9.00 ± 0.00 |" in report.table(rows)


@pytest.mark.parametrize("study", STUDIES.values(), ids=lambda study: study.name)
def test_every_run_of_a_study_has_a_name_of_its_own(study):
    names = [slug(variation.name) for variation in study.variations]
    assert len(set(names)) == len(names)


def test_an_unknown_study_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["nothing", "--runs", "x"])
    assert "nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["fronts", "--runs", "x", "--only", "mogd 5 to 5"])
    assert "--only: no variation of fronts is named mogd 5 to 5" in capsys.readouterr().err


@pytest.mark.parametrize("study", STUDIES.values(), ids=lambda study: study.name)
def test_every_run_of_a_study_has_a_configuration(study):
    config = override(with_epochs(recipes.load(study.recipe), study.epochs), study.settings)
    for variation in study.variations:
        dataclasses.replace(config, **variation.changes)
        if variation.joint and study.shared_epochs:
            assert study.shared_epochs <= config.natural_epochs + config.certified_epochs


def test_batch_statistics_are_taken_in_the_layers_that_are_named(tmp_path):
    trainer = trained(full_strength("ibp", **SHI), tmp_path, (1,), few_digits())
    network, epsilon = trainer.network, trainer.config.epsilon
    before = copy.deepcopy(network.state_dict())
    found = batch_statistics.carry_out(trainer, 2)
    assert all(map(torch.equal, before.values(), network.state_dict().values()))

    frozen = {"all": "", "all but layer 1": "1", "layer 1": "23", "layer 2": "13", "layer 3": "12"}
    random = torch.Generator().manual_seed(trainer.config.seed)
    for batch in range(2):
        rows = torch.randint(len(trainer.x), (32,), generator=random)
        x, labels = trainer.x[rows].float() / 255, trainer.labels[rows]
        for name, layers in (frozen | {"none": "123"}).items():
            for number, layer in enumerate(batch_norms(network), 1):
                layer.statistics_frozen = str(number) in layers
            with clean_statistics(network.train(), x):
                loss = certified_loss(network, Interval.around(x, epsilon), labels)
            gradients = torch.autograd.grad(loss, list(network.parameters()))
            length = torch.cat([gradient.flatten() for gradient in gradients]).norm()
            expected = torch.stack([loss.detach(), length])
            torch.testing.assert_close(found[name][batch], expected)
    assert len({values.sum().item() for values in found.values()}) == len(frozen) + 1


def test_a_network_without_batch_norm_has_no_statistics_to_study():
    trainer = Trainer(full_strength("ibp"), few_digits(), ALONE)
    with pytest.raises(UserError, match=r"^RUN: expected a run that trains with BatchNorm"):
        batch_statistics.carry_out(trainer, 1)


@pytest.fixture
def with_a_frozen_layer():
    """Whose first frozen epoch was its last one."""
    config = full_strength("ibp", **SHI, first_batch_norm_frozen_from=1)
    trainer = Trainer(config, few_digits(), ALONE)
    trainer.epochs_done = 2
    trainer.network.eval()
    return trainer


def test_the_study_of_rounding_takes_the_first_layer_in_float32_in_the_second_row_alone(
    with_a_frozen_layer, monkeypatch
):
    trainer = with_a_frozen_layer
    seen: list[tuple[int, torch.dtype]] = []
    forward = nn.Conv2d.forward

    def look(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        output = forward(layer, x)
        seen.append((layer.in_channels, output.dtype))
        return output

    monkeypatch.setattr(nn.Conv2d, "forward", look)
    kinds = {}
    for name, way in rounding.ways(trainer.network.eval()).items():
        seen.clear()
        way(lambda layers: layers(trainer.x[:2].float() / 255).float().sum())
        kinds[name] = ({kind for n, kind in seen if n == 1}, {kind for n, kind in seen if n > 1})
    single, half = {torch.float32}, {torch.bfloat16}
    assert list(kinds.values()) == [(single, single), (single, half), (half, half)]


def test_the_study_of_rounding_measures_the_loss_that_trains(with_a_frozen_layer):
    trainer = with_a_frozen_layer
    network, epsilon = trainer.network, trainer.config.epsilon
    found = rounding.carry_out(trainer, 2)
    assert network.training
    random = torch.Generator().manual_seed(trainer.config.seed)
    for batch in range(2):
        rows = torch.randint(len(trainer.x), (32,), generator=random)
        x, labels = trainer.x[rows].float() / 255, trainer.labels[rows]
        assert [layer.statistics_frozen for layer in batch_norms(network)] == [True, False, False]
        with clean_statistics(network, x):
            loss = certified_loss(network, Interval.around(x, epsilon), labels)
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        length = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        torch.testing.assert_close(found["float32"][batch], torch.stack([loss.detach(), length]))
    exact, first_exact, rounded = found.values()
    assert not torch.equal(exact, first_exact)
    assert not torch.equal(first_exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0)


def test_what_no_epoch_has_frozen_is_not_frozen_in_the_study_of_rounding():
    config = full_strength("ibp", **SHI, first_batch_norm_frozen_from=2)
    trainer = Trainer(config, few_digits(), ALONE)
    trainer.epochs_done = 2
    rounding.carry_out(trainer, 1)
    assert not any(layer.statistics_frozen for layer in batch_norms(trainer.network))


@pytest.mark.parametrize("stage", [0, 1])
def test_a_run_without_an_epoch_or_in_a_stage_has_no_rounding_to_study(stage):
    trainer = Trainer(full_strength("ibp", stages=1), few_digits(), ALONE)
    trainer.begin_stage(stage)
    trainer.epochs_done = stage
    with pytest.raises(UserError, match=r"^RUN: expected a run within its first stage, after an"):
        rounding.carry_out(trainer, 1)


@pytest.mark.parametrize(
    ("study", "rows"),
    [
        (
            batch_statistics.STUDY,
            ["all", "all but layer 1", "layer 1", "layer 2", "layer 3", "none"],
        ),
        (rounding.STUDY, ["float32", "bf16, the first layer's in float32", "bf16"]),
    ],
    ids=["batch statistics", "rounding"],
)
def test_a_study_of_gradients_prints_a_table_for_each_run(study, rows, tmp_path, capsys):
    config = dataclasses.replace(full_strength("ibp", **SHI), epochs=1)
    trained(config, tmp_path, (1,))
    RunDirectory(tmp_path).config_file.write_text(config.to_toml())
    gradient_lengths.main(study, [str(tmp_path), "--batches", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}, after 1 epochs"
    assert lines[2].startswith(f"| {study.ways} | loss: median | ")
    assert [line.split(" | ")[0] for line in lines[4:-1]] == [f"| {row}" for row in rows]


def test_no_batches_make_no_table(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gradient_lengths.main(batch_statistics.STUDY, [str(tmp_path), "--batches", "0"])
    assert "--batches: expected at least 1, found 0" in capsys.readouterr().err


def test_gradients_longer_than_three_medians_are_counted():
    lengths = torch.tensor([1.0, 2.0, 2.0, 6.0, 6.1])
    found = {"all": torch.stack([torch.arange(5.0), lengths], dim=1)}
    *_, row = gradient_lengths.table(found, "ways").splitlines()
    assert row == "| all | 2.000 | 4.00 | 2.0 | 6.1 | 1 of 5 |"
