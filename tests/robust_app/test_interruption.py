"""SIGTERM ends what Ctrl-C ends."""

import os
import signal

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
