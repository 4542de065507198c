import math
import os
import signal
import threading

import pytest
import scipy.optimize
import torch

from robust_app.programming import Program, _power_of_two


def knapsack():
    """Weights 3, 4, 5 up to 8, each at most once."""
    program = Program()
    taken = program.variables(torch.zeros(3), torch.ones(3), integer=True)
    weights = torch.tensor([[3.0, 4.0, 5.0]])
    program.constrain([(weights, taken)], torch.tensor([-torch.inf]), torch.tensor([8.0]))
    return program, taken


def test_a_solution_meets_limit_and_constraints():
    program, taken = knapsack()
    values = torch.tensor([-4.0, -5.0, -6.0])  # 3 + 5 are worth 10, the relaxation's best is 10.2
    answer = program.minimum_below(taken, values, limit=-9.5, seconds=60.0)
    assert answer.solution.tolist() == pytest.approx([1, 0, 1])
    assert not answer.infeasible


def test_beyond_the_best_integers_there_is_none():
    program, taken = knapsack()
    answer = program.minimum_below(taken, torch.tensor([-4.0, -5.0, -6.0]), -10.1, seconds=60.0)
    assert answer.infeasible
    assert answer.solution is None


def test_diagonals_and_several_terms():
    program = Program()
    x = program.variables(torch.tensor([0.0, 0.0]), torch.tensor([4.0, 4.0]))
    y = program.variables(torch.tensor([0.0, 0.0]), torch.tensor([9.0, 9.0]))
    assert y.tolist() == [2, 3]
    # y = 2 x + (x2, x1) + 1
    swapped = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    ones = torch.ones(2)
    program.constrain([(ones, y), (-2 * ones, x), (-swapped, x)], ones, ones)
    program.constrain([(ones, x)], torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    answer = program.minimum_below(y[:1], torch.ones(1), limit=9.0, seconds=60.0)
    assert answer.solution.tolist() == pytest.approx([1, 2, 5, 6])


def test_without_time_nothing_is_known():
    program, taken = knapsack()
    assert program.minimum_below(taken, torch.ones(3), 1.0, seconds=0.0) == (False, None)


def test_a_search_that_is_given_up_proves_nothing():
    program, taken = knapsack()
    assert not program.minimum_below(taken, -torch.ones(3), -1.5, seconds=1e-9).infeasible


def test_ctrl_c_leaves_a_solver_that_goes_on(monkeypatch):
    heard, released = [], threading.Event()

    def endless(*_, **__):
        heard.append(threading.current_thread() is threading.main_thread())
        os.kill(os.getpid(), signal.SIGINT)
        released.wait()

    program, taken = knapsack()
    monkeypatch.setattr(scipy.optimize, "milp", endless)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            program.minimum_below(taken, torch.ones(3), 1.0, seconds=60.0)
    finally:
        signal.signal(signal.SIGINT, before)
        released.set()
    assert heard == [False]  # only Python's main thread hears signals, and is not in the solver


def test_what_goes_wrong_in_the_solver_is_told(monkeypatch):
    program, taken = knapsack()
    monkeypatch.setattr(scipy.optimize, "milp", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        program.minimum_below(taken, torch.ones(3), 1.0, seconds=60.0)


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1.0, 1e9, 1e30])
def test_the_size_of_variables_rows_and_costs_does_not_count(size):
    def number(value):
        return torch.tensor([value], dtype=torch.float64)

    program = Program()
    x = program.variables(number(0.0), number(1e-9 * size))
    program.constrain([(number(size), x)], number(0.4e-9 * size**2), number(torch.inf))
    for share, solved in ((0.5, True), (0.3, False)):
        answer = program.minimum_below(x, number(size), share * 1e-9 * size**2, seconds=60.0)
        assert (answer.solution is not None, answer.infeasible) == (solved, not solved)
        if answer.solution is not None:
            assert 0.399e-9 < answer.solution.item() / size < 0.501e-9


def test_powers_of_two_are_exact_and_above():
    values = [0.0, 1.0, 3.0, 0.7, 1e60, 1e-60, 1e250, 1e-250, 2.0**-3]
    found = _power_of_two(torch.tensor(values, dtype=torch.float64)).tolist()
    assert found[:4] == [1.0, 2.0, 4.0, 1.0]
    for value, power in zip(values[1:], found[1:], strict=True):
        assert math.frexp(power)[0] == 0.5
        assert 0.5 <= value / power < 1
    assert all(0 < p < math.inf for p in _power_of_two(torch.tensor([1.7e308, 5e-324]).double()))
