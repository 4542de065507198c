"""An optimizer inside an object that imitates its class, as Lightning's and Fabric's do."""

import pytest
import torch
from chosen import (
    AGREEING,
    CONFLICTING,
    assert_same_bits,
    doubles,
    linear,
    optimizer_after,
    snapshot,
)


class Imitation:
    """A subclass of its optimizer's class that has none of its state, and looks it up there."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.__class__ = type("Imitation", (Imitation, type(optimizer)), {})

    def __getattr__(self, name):
        return getattr(self.optimizer, name)

    def step(self):
        self.optimizer.step(closure=lambda: None)


def losses(p, gradients):
    return [linear(p, gradient) for gradient in gradients]


def pair(**options):
    p, optimizer = optimizer_after(lr=0.1, momentum=0.9, **options)
    q, plain = optimizer_after(lr=0.1, momentum=0.9, **options)
    return p, Imitation(optimizer), q, plain


def test_it_trains_the_optimizer_and_its_moments_as_if_called_directly():
    p, imitation, q, plain = pair()
    assert isinstance(imitation, type(plain))
    for gradients in (AGREEING, CONFLICTING, CONFLICTING):
        for parameter, optimizer in ((p, imitation), (q, plain)):
            optimizer.zero_grad()
            with optimizer.accumulate():
                optimizer.backward(losses(parameter, gradients))
            optimizer.backward(losses(parameter, AGREEING))
            optimizer.step()
        assert_same_bits(vars(imitation.last), vars(plain.last))
    assert_same_bits(snapshot(imitation.optimizer), snapshot(plain))
    assert vars(imitation).keys() == {"optimizer"}


def test_what_is_not_finite_is_skipped_and_counted():
    p, imitation, _, _ = pair(nonfinite="skip")
    imitation.backward(losses(p, (*AGREEING[:1], (float("nan"), 0.0))))
    imitation.step()
    assert p.tolist() == [0, 0]
    assert imitation.skipped == imitation.optimizer.skipped == 1


def test_zero_grad_drops_what_was_accumulated():
    p, imitation, _, _ = pair()
    with imitation.accumulate():
        imitation.backward(losses(p, AGREEING))
    with pytest.raises(RuntimeError, match="not combined"):
        imitation.step()
    imitation.zero_grad()
    imitation.backward(losses(p, CONFLICTING))
    assert imitation.last.losses.tolist() == [0, 0]
    assert imitation.last.norms.tolist() == [0, 0]
    assert p.grad.tolist() == doubles(-0.5, 1.5).tolist()


def test_a_state_that_is_loaded_reaches_the_optimizer():
    _, imitation, q, plain = pair()
    plain.backward(losses(q, CONFLICTING))
    plain.step()
    imitation.load_state_dict(plain.state_dict())
    with torch.no_grad():
        imitation.param_groups[0]["params"][0].copy_(q)
    assert_same_bits(snapshot(imitation.optimizer), snapshot(plain))
    assert_same_bits(imitation.state_dict(), plain.state_dict())
