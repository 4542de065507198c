"""Gradient attacks within the l_inf ball: FGSM, PGD and the search for a misclassification."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from robust_app.interval import ball_ends, check_images
from robust_app.layers import applied

Network = Callable[[Tensor], Tensor]

IMAGES = (0.0, 1.0)
ANYTHING = (-math.inf, math.inf)  # the domain of what lies between two layers
_STARTS_AT_ONCE = 2**26  # entries, 256 MiB in float32; but all of an image


def pgd(
    network: Network,
    x: Tensor,
    labels: Tensor,
    epsilon: float | Tensor,
    *,
    start: Tensor,
    steps: int,
    step_size: float | Tensor,
    domain: tuple[float, float] = IMAGES,
) -> Tensor:
    """Projected gradient ascent on the cross entropy (Madry et al.; inner problem of eq. 1).

    Each step adds ``step_size * sign(gradient)`` and projects onto the ball of radius ε around
    x and onto the domain. Parameters keep their ``.grad``. With a box of hidden values in place
    of a ball of images (A.6), ``x`` is its centre and ``epsilon`` its radius.

    Args:
        network: from ``x`` to logits ``(batch, classes)``, in the mode that the caller wants.
        x: images in [0, 1], ``(batch, ...)``.
        labels: the true classes, int64 ``(batch,)``.
        epsilon: radius >= 0 in pixels of [0, 1]: a number, a 0-dim tensor, or one like ``x``.
        start: the first perturbation in units of ε, entries in [-1, 1], of the shape of ``x``.
        steps: number of steps, at least 1.
        step_size: >= 0 in pixels of [0, 1]: a number, a 0-dim tensor, or one like ``x``.
        domain: least and largest value that an entry may have; [0, 1] by default.

    Returns:
        The adversarial examples x_adv, detached, of the shape of ``x``.

    Raises:
        ValueError: an argument is out of its range or ``start`` of another shape than ``x``.

    >>> x, y = torch.tensor([[0.5, 0.5]]), torch.tensor([0])
    >>> pgd(torch.nn.Identity(), x, y, 0.25, start=torch.zeros(1, 2), steps=2, step_size=0.2)
    tensor([[0.2500, 0.7500]])
    """
    _check_at_least_one("steps", steps)
    _check_not_negative("step_size", step_size)
    if start.shape != x.shape:
        raise ValueError(
            f"start must have the shape of x, {tuple(x.shape)}, got {tuple(start.shape)}"
        )
    lower, upper = ball_ends(x, epsilon, domain)
    x_adv = torch.clamp(x + epsilon * start, lower, upper)
    for _ in range(steps):
        x_adv, _ = _ascend(network, x_adv, labels, step_size, lower, upper)
    return x_adv


def fgsm(
    network: Network,
    x: Tensor,
    labels: Tensor,
    epsilon: float | Tensor,
    *,
    start: Tensor,
    step_size: float | Tensor,
    domain: tuple[float, float] = IMAGES,
) -> Tensor:
    """:func:`pgd` with one step: FGSM from a random start (Wong et al.).

    Their step size, and that of the paper's authors, is 1.25 ε. Arguments, result and errors are
    those of :func:`pgd`.

    >>> x, y = torch.tensor([[0.5, 0.5]]), torch.tensor([0])
    >>> fgsm(torch.nn.Identity(), x, y, 0.25, start=torch.zeros(1, 2), step_size=0.1)
    tensor([[0.4000, 0.6000]])
    """
    return pgd(
        network, x, labels, epsilon, start=start, steps=1, step_size=step_size, domain=domain
    )


def uniform_start(x: Tensor, generator: torch.Generator) -> Tensor:
    """Independent uniform draws from [-1, 1), one per entry of ``x``: a ``start`` for an attack.

    Drawn on the generator's device, so that a CPU generator gives the same on every device.

    >>> uniform_start(torch.zeros(2, 3), torch.Generator().manual_seed(0)).shape
    torch.Size([2, 3])
    """
    draws = torch.rand(x.shape, generator=generator, device=generator.device, dtype=x.dtype)
    return (2 * draws - 1).to(x.device)


@torch.no_grad()
def falsified(
    network: Network,
    x: Tensor,
    labels: Tensor,
    epsilon: float | Tensor,
    *,
    steps: int,
    restarts: int,
    generator: torch.Generator,
) -> Tensor:
    """Whether an image of the ball is found that the network misclassifies.

    Looks at the clean image, then at every iterate of :func:`pgd` from ``restarts`` uniform
    starts with step size 2.5 ε / steps (Madry et al.). An example is attacked until broken.

    Args:
        network: from ``x`` to logits ``(batch, classes)``; in evaluation mode.
        x: images in [0, 1], ``(batch, ...)``.
        labels: the true classes, int64 ``(batch,)``.
        epsilon: radius >= 0 in pixels of [0, 1], a number or a 0-dim tensor.
        steps: number of steps from each start, at least 1.
        restarts: number of starts, at least 1.
        generator: the source of the starts, drawn image after image, all of an image together: one
            on the CPU gives a set of images the same starts in however many parts it comes, on
            any device.

    Returns:
        Booleans ``(batch,)``, true where a misclassified image is found.

    Raises:
        ValueError: an argument is out of its range.

    >>> x, y = torch.tensor([[0.8, 0.4], [0.5, 0.4]]), torch.tensor([0, 0])
    >>> generator = torch.Generator().manual_seed(0)
    >>> falsified(torch.nn.Identity(), x, y, 0.1, steps=5, restarts=1, generator=generator)
    tensor([False,  True])
    """
    _check_at_least_one("steps", steps)
    _check_at_least_one("restarts", restarts)
    check_images(x)
    at_once = max(1, _STARTS_AT_ONCE // (restarts * x[:1].numel() or 1))
    if len(x) > at_once:
        attack = partial(falsified, network, epsilon=epsilon, steps=steps, restarts=restarts)
        parts = zip(torch.split(x, at_once), torch.split(labels, at_once), strict=True)
        return torch.cat([attack(*part, generator=generator) for part in parts])
    lower, upper = ball_ends(x, epsilon)
    step_size = 2.5 * epsilon / steps
    broken = applied(network, x).argmax(1) != labels
    starts = uniform_start(x.new_empty(()).expand(len(x), restarts, *x.shape[1:]), generator)
    for start in starts.unbind(1):
        standing = (~broken).nonzero().squeeze(1)
        x_adv = torch.clamp(
            x[standing] + epsilon * start[standing], lower[standing], upper[standing]
        )
        for _ in range(steps):
            if len(standing) == 0:
                return broken
            x_adv, logits = _ascend(
                network, x_adv, labels[standing], step_size, lower[standing], upper[standing]
            )
            # These are the logits of the iterate before the step, so each is judged for free.
            correct = logits.argmax(1) == labels[standing]
            broken[standing] = ~correct
            standing, x_adv = standing[correct], x_adv[correct]
        if len(standing):
            broken[standing] = network(x_adv).argmax(1) != labels[standing]
    return broken


def _ascend(
    network: Network,
    x_adv: Tensor,
    labels: Tensor,
    step_size: float | Tensor,
    lower: Tensor,
    upper: Tensor,
) -> tuple[Tensor, Tensor]:
    """The iterate after ``x_adv``, and the logits at ``x_adv``; both detached."""
    with torch.enable_grad():
        x_adv = x_adv.detach().requires_grad_()
        logits = applied(network, x_adv)
        # The sum, not the mean: small gradients must not underflow with the batch size.
        loss = F.cross_entropy(logits, labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x_adv)
    x_adv = torch.clamp(x_adv.detach() + step_size * gradient.sign(), lower, upper)
    return x_adv, logits.detach()


def _check_at_least_one(name: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")


def _check_not_negative(name: str, value: float | Tensor) -> None:
    # A tensor's value stays unread: looking at it would synchronise with the device.
    if not (isinstance(value, Tensor) or value >= 0):
        raise ValueError(f"{name} must be at least 0, got {value}")
