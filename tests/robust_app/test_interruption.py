"""SIGTERM ends what Ctrl-C ends."""

import os
import signal
import subprocess
import sys

import pytest

from robust_app.interruption import Terminated, stoppable


@pytest.fixture
def usual():
    """The handlers of an ordinary process, whatever the tests are run by."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


def test_a_scheduler_that_repeats_itself_is_heard_once(usual):
    with stoppable() as stop:
        assert stop.status is None
        with pytest.raises(Terminated):
            send(signal.SIGTERM)
        assert stop.status == 143
        send(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


LEFT = """
import atexit, os, signal
import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from robust_app import cli, programming

weights = np.random.default_rng(0).integers(1, 100, (40, 150)).astype(float)

def solve():
    os.kill(os.getpid(), signal.SIGINT)
    within = LinearConstraint(weights, -np.inf, weights.sum(1) / 3)
    options = {"time_limit": 30.0}
    milp(-weights[0], constraints=[within], integrality=1, bounds=Bounds(0, 1), options=options)

atexit.register(print, "Python's own end, which may abort while the solver returns")
cli.app = lambda **_: programming._interruptible(solve)
cli.main()
"""


def test_a_process_whose_solver_goes_on_ends_without_it():
    command = [sys.executable, "-c", LEFT]
    done = subprocess.run(command, text=True, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


WAITED_FOR = """
import os, signal, time
from robust_app import programming

def solve():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)
    print("solved")

programming._interruptible(solve)
"""


def test_a_program_of_one_s_own_waits_for_the_solver_at_its_end():
    command = [sys.executable, "-c", WAITED_FOR]
    done = subprocess.run(command, text=True, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "solved\n")
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")


OF_SEVERAL = """
import atexit
from robust_app import cli

atexit.register(print, "Python's own end, which may abort in a thread of gloo")
cli.app = lambda **_: print("done")
cli.main()
"""


def test_one_of_several_processes_ends_without_python_s_own_end():
    done = subprocess.run(
        [sys.executable, "-c", OF_SEVERAL],
        env=os.environ | {"WORLD_SIZE": "2", "PYTHONUNBUFFERED": ""},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("stream", ["1", "2"])
def test_one_of_several_processes_may_have_no_output(stream):
    done = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m robust_app recipes digits {stream}>&-"],
        env=os.environ | {"WORLD_SIZE": "2"},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_torchrun_may_terminate_what_ctrl_c_has_stopped_but_a_user_may_insist(usual):
    with stoppable() as stop:
        with pytest.raises(KeyboardInterrupt) as caught:
            send(signal.SIGINT)
        assert not isinstance(caught.value, Terminated)
        assert stop.status == 130
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_was_to_be_ignored_stays_so(usual):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stoppable() as stop:
        send(signal.SIGINT)
    assert stop.status is None


INTERRUPTED_IMPORT = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, *_):
        if name == "torch":
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                print("caught, as libraries do")

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupting())
sys.argv = ["robust-app", "--version"]
from robust_app.__main__ import main
main()
"""


def interrupted_import(program=INTERRUPTED_IMPORT):
    """Status and output of a program that interrupts itself while it imports torch."""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    return ended.returncode, ended.stdout, ended.stderr


def test_an_interruption_while_libraries_are_imported_ends_at_once_and_silently():
    assert interrupted_import() == (130, b"", b"")


def test_whoever_is_to_ignore_interruptions_ignores_them_then_too():
    program = INTERRUPTED_IMPORT.replace("signal.default_int_handler", "signal.SIG_IGN")
    status, out, err = interrupted_import(program)
    assert (status, err) == (0, b"")
    assert out.startswith(b"robust-app ")


def test_after_the_imports_the_usual_handler_is_back():
    program = INTERRUPTED_IMPORT.replace('name == "torch"', "False").replace(
        "\nmain()\n",
        "\ntry: main()\nexcept SystemExit: pass"
        "\nassert signal.getsignal(signal.SIGINT) is signal.default_int_handler",
    )
    status, out, err = interrupted_import(program)
    assert (status, err) == (0, b"")
    assert out.startswith(b"robust-app ")
