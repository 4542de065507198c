"""``torch.distributed.checkpoint``, by one process and by two with sharded parameters."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import reports
from test_parallel import batch, objectives, whole
from test_shards import Network, by_columns, nested
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from mogd import UnbiasedMultiGradient

WORLD = 2

# Said of every checkpoint that a process saves or loads alone:
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


class Run:
    """A model and its optimizer."""

    def __init__(self, rank: int = 0, world: int = 1, wrap: Any = lambda model: model) -> None:
        self.rank, self.world = rank, world
        self.model = wrap(Network())
        self.optimizer = UnbiasedMultiGradient(
            self.model.parameters(), torch.optim.Adam, moment_decay=(0.5, 0.8), lr=0.05
        )

    def train(self, steps: range) -> "Run":
        for step in steps:
            x = batch(step, self.rank, self.world)
            self.optimizer.step(lambda x=x: objectives(self.model, x))
        return self

    def save(self, folder: Any) -> None:
        dcp.save(self.parts(), checkpoint_id=folder, no_dist=self.world == 1)

    def load(self, folder: Any) -> "Run":
        """After one step on other data: what is loaded needs tensors to be loaded into."""
        self.train(range(20, 21))
        dcp.load(self.parts(), checkpoint_id=folder, no_dist=self.world == 1)
        return self

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}

    def result(self) -> dict[str, Any]:
        """All of it as one process would hold it."""
        state = copy.deepcopy(self.optimizer.state_dict())
        moments = state["moments"]
        return {
            "parameters": [whole(parameter) for parameter in self.model.parameters()],
            "moments": moments and moments | {"exp_avg": wholes(moments["exp_avg"])},
            "base": {position: wholes(of) for position, of in state["state"].items()},
        }


def wholes(tensors: dict[Any, Tensor]) -> dict[Any, Tensor]:
    return {key: whole(tensor) for key, tensor in tensors.items()}


def sharded(rank: int, world: int) -> dict[str, Any]:
    run = Run(rank, world, nested).train(range(3))
    run.save("sharded")
    torch.save([run.model.state_dict(), run.optimizer.state_dict()], f"own {rank}.pt")
    own = Run(rank, world, nested)
    of_model, of_optimizer = torch.load(f"own {rank}.pt", weights_only=True)
    own.model.load_state_dict(of_model)
    own.optimizer.load_state_dict(of_optimizer)
    return {
        "own files": own.train(range(3, 6)).result(),
        "straight": run.train(range(3, 6)).result(),
        "resumed": Run(rank, world, nested).load("sharded").train(range(3, 6)).result(),
        "by columns": Run(rank, world, by_columns).load("sharded").train(range(3, 6)).result(),
        "of one": Run(rank, world, nested).load("alone").train(range(3, 6)).result(),
    }


def refused(rank: int, world: int) -> str:
    """A plain state for sharded parameters."""
    run = Run(rank, world, nested)
    try:
        run.optimizer.load_state_dict(Run().train(range(1)).optimizer.state_dict())
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the checkpoints of one process and of two are."""
    folder = tmp_path_factory.mktemp("checkpoints")
    Run().train(range(3)).save(folder / "alone")
    return folder


@pytest.fixture(scope="module")
def processes(folder) -> list[dict[str, Any]]:
    return reports({"sharded": sharded, "refused": refused}, WORLD, folder)


@pytest.fixture(scope="module")
def straight() -> dict[str, Any]:
    return Run().train(range(6)).result()


def test_one_process_continues_to_the_same_bits(folder, straight):
    resumed = Run().load(folder / "alone").train(range(3, 6)).result()
    torch.testing.assert_close(resumed, straight, rtol=0, atol=0)


@pytest.mark.parametrize("way", ["resumed", "own files"])
def test_two_processes_continue_to_the_same_bits(processes, way):
    for found in processes:
        states = found["sharded"]
        torch.testing.assert_close(states[way], states["straight"], rtol=0, atol=0)


@pytest.mark.parametrize("way", ["straight", "by columns", "of one"])
def test_a_checkpoint_loads_however_the_parameters_are_sharded(processes, straight, way):
    for found in processes:
        torch.testing.assert_close(found["sharded"][way], straight, rtol=1e-7, atol=1e-10)


def test_one_process_loads_what_two_saved(processes, folder, straight):
    resumed = Run().load(folder / "sharded").train(range(3, 6)).result()
    torch.testing.assert_close(resumed, straight, rtol=1e-7, atol=1e-10)


def test_a_state_that_is_not_sharded_is_refused(processes):
    for found in processes:
        assert "parameter 0 is not sharded over processes as the parameter is" in found["refused"]


def test_the_bits_do_not_depend_on_the_order_of_the_tensors_loaded_into():
    """Parameters that appear late, and not in the optimizer's order."""
    run = Run().train(range(2))
    state = copy.deepcopy(run.optimizer.state_dict())
    exp_avg = state["moments"]["exp_avg"]
    state["moments"]["exp_avg"] = {position: exp_avg[position] for position in reversed(exp_avg)}
    run.optimizer.load_state_dict(state)
    assert run.optimizer.state_dict()["moments"]["order"] == list(exp_avg)


def test_moments_that_found_no_tensor_to_be_loaded_into_are_missed():
    run = Run().train(range(2))
    state = copy.deepcopy(run.optimizer.state_dict())
    del state["moments"]["exp_avg"][1]
    with pytest.raises(ValueError, match=r"of parameters \[0, 2, .*expected \[0, 1, 2"):
        run.optimizer.load_state_dict(state)


def test_an_optimizer_without_a_step_has_nothing_to_be_loaded_into(folder):
    with pytest.raises(dcp.api.CheckpointException, match=r"optimizer\.moments"):
        dcp.load(Run().parts(), checkpoint_id=folder / "alone", no_dist=True)


def test_get_optimizer_state_dict_leaves_the_moments_out():
    """It takes the state of each parameter and the groups; of the base that is all."""
    run, again = Run().train(range(2)), Run()
    state = get_optimizer_state_dict(run.model, run.optimizer)
    assert state.keys() == {"state", "param_groups"}
    with pytest.raises(ValueError, match=r"lacks \['moment_decay', 'moments', 'skipped'\]"):
        set_optimizer_state_dict(again.model, again.optimizer, state)
    set_optimizer_state_dict(again.model, again.optimizer.base, state)
    found = again.result()["base"]
    torch.testing.assert_close(found, run.result()["base"], rtol=0, atol=0)
