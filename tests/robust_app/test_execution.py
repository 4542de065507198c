"""How steps are run: what they are given, and that the way of running changes no result."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from robust_app.distributed import World
from robust_app.errors import UserError
from robust_app.execution import Compiled, Eager, Values, all_or_nothing
from robust_app.reporting import Silent
from robust_app.schedules import Phase, Setting
from robust_app.training import Trainer
from tests.robust_app.runs import A_MOMENT, ALONE, SHI, few_digits, full_strength, parameters_of

CPU = torch.device("cpu")
units = st.floats(0, 1, width=32)
settings_ = st.builds(
    Setting,
    phase=st.sampled_from(Phase),
    epsilon=units,
    fosc_threshold=units,
    learning_rate=units,
    natural_weight=units,
    crown_share=units,
    box_regularizers=units,
)


def numbers(values: Values) -> dict[str, float]:
    return {name: float(value) for name, value in vars(values).items()}


@given(settings_)
def test_all_numbers_but_the_ends_become_tensors(now):
    values = Values.tensors(now, CPU)
    ends = {name for name, value in vars(values).items() if not isinstance(value, Tensor)}
    assert ends == all_or_nothing(now).keys()
    assert {"epsilon", "learning_rate", "fosc_threshold"}.isdisjoint(ends)
    assert numbers(values) == numbers(Values.of(now, CPU))
    assert all(getattr(now, name) in (0, 1) for name in ends)


@given(settings_, settings_)
def test_tensors_are_filled_in_place_and_the_ends_stay(before, after):
    values = Values.tensors(before, CPU)
    held = dict(vars(values))
    values.fill(after)
    assert all(vars(values)[name] is value for name, value in held.items())
    for name, value in numbers(values).items():
        assert value == getattr(before if name in all_or_nothing(before) else after, name)


def test_a_part_is_left_out_at_its_end_alone():
    ends = {"epsilon": 0.0, "fosc_threshold": 0.0, "natural_weight": 1.0, "crown_share": 1.0}
    now = dataclasses.replace(A_MOMENT, **ends)
    assert all_or_nothing(now) == {"natural_weight": 1.0, "box_regularizers": 0.0}


def test_an_eager_step_computes_with_numbers():
    """Whose products with float32 are rounded once."""
    seen = []
    now = dataclasses.replace(A_MOMENT, natural_weight=0.3)
    Eager(lambda *given: seen.append(given) or {}, CPU)(now, *torch.zeros(3, 1))
    [(phase, values, *inputs)] = seen
    assert (phase, len(inputs)) == (Phase.MAIN, 3)
    assert (values.natural_weight, values.learning_rate) == (0.3, 0.1)
    assert torch.equal(values.epsilon, torch.tensor(0.05))


def test_compiling_is_for_one_process():
    Compiled.check(World(0, 1, CPU))
    with pytest.raises(UserError, match=r"^--execution: compile is for one process"):
        Compiled.check(World(0, 2, CPU))


COMPILED = {
    "joint": {"method": "advibp", "batch_norm": True, "ibp_initialization": True},
    "joint with regularisers": {"method": "advibp", "ramp_epochs": 1.5, **SHI},
    "joint with crown": {"method": "advcrown-ibp", "crown_share": (0.9, 0.1), "ramp_epochs": 1.5},
    "mixed": {"method": "ibp", "natural_epochs": 0.4, "ramp_epochs": 1.5},
    "a frozen norm": {"method": "advibp", "first_batch_norm_frozen_from": 1.5, **SHI},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_losses_train_as_eager_ones_do(name):
    config = full_strength(epochs=2, **COMPILED[name])
    eager, compiled = (Trainer(config, few_digits(), ALONE, kind) for kind in (Eager, Compiled))
    start = parameters_of(eager).clone()
    for trainer in (eager, compiled):
        metrics = [trainer.train_epoch(Silent()) for _ in range(2)]
    travelled = (parameters_of(eager) - start).norm()
    assert (parameters_of(compiled) - parameters_of(eager)).norm() < 1e-3 * travelled
    assert all(loss > 0 for key, loss in metrics[1].items() if key.endswith("_loss"))


@pytest.mark.slow
def test_numbers_that_change_compile_nothing_again():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = full_strength("advibp", epochs=2, ramp_epochs=2.0, milestones=(1.5,))
    trainer = Trainer(config, few_digits(), ALONE, Compiled)
    for _ in range(2):
        trainer.train_epoch(Silent())
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2  # one for each loss
    assert counters["graph_break"] == {}
