"""What keeps bounds tight and ReLUs balanced while ε grows (Shi et al. 2021, section 4.2).

Both functions read the boxes of :func:`robust_app.margins.layer_inputs`. Means are over all
entries of the batch, those of the other processes included. The source is "Fast Certified Robust
Training with Short Warmup"; what it leaves open is said where it is decided.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from robust_app.distributed import of_all_processes
from robust_app.interval import Interval
from robust_app.layers import Normalize
from robust_app.precision import at_least_float32, without_autocast

TOLERANCE = 0.5  # τ: how far from 1 a ratio may be at no cost
_NOTHING = 1e-12  # what is smaller is no denominator: its reciprocal's square is still finite

LayerInputs = Iterable[tuple[nn.Module, Interval]]


def regularization(inputs: LayerInputs) -> Tensor:
    """The sum of :func:`tightness` and :func:`relu_balance`, which also say what ``inputs`` is.

    >>> box = Interval(torch.tensor([[3.0, -1.0]]), torch.tensor([[0.5, 0.5]]))
    >>> regularization([(nn.Identity(), box), (nn.ReLU(), box)])  # unbalanced: 3 to 1
    tensor(0.3333)
    """
    pairs = list(inputs)
    return tightness(pairs) + relu_balance(pairs)


def tightness(inputs: LayerInputs) -> Tensor:
    """How much wider boxes are before the ReLUs than at the input, in [0, 1].

    The mean over ReLU layers of max(τ - r₀/r, 0)/τ, with r the mean radius of the layer's box and
    r₀ that of the network's input, after its normalisation where it begins with one. A layer
    whose radius is 0 (at ε = 0, say) is as tight as can be and adds nothing.

    Args:
        inputs: each layer with the box at its input, in the network's order.

    Returns:
        0-dim tensor; its gradient is finite too.

    Raises:
        ValueError: there is no ReLU layer.

    >>> input, hidden = (Interval(torch.zeros(1, 2), torch.full((1, 2), r)) for r in (0.1, 0.4))
    >>> tightness([(nn.Linear(2, 2), input), (nn.ReLU(), hidden)])  # 0.25 of 1: half of τ
    tensor(0.5000)
    """
    pairs = list(inputs)
    boxes = _before_relus(pairs)
    network_input = next(box for layer, box in pairs if not isinstance(layer, Normalize))
    means = [at_least_float32(box.radius).mean() for box in (network_input, *boxes)]
    radii = of_all_processes(torch.stack(means)).mean(0)
    first, radius = radii[0], radii[1:]
    ratio = first / radius.clamp(min=_NOTHING)
    return _shortfall(torch.where(radius > _NOTHING, ratio, 1)).mean()


def relu_balance(inputs: LayerInputs) -> Tensor:
    """How unequal active and inactive neurons are, in [0, 2].

    The mean over ReLU layers of max(τ - ρ, 0)/τ for two ratios ρ of the active neurons (lower
    bound above 0) to the inactive ones (upper bound below 0), inverted where they are above 1:
    of the sums of their centres' absolute values, and of the sums of their centres' squared
    deviations from the layer's mean centre. A ratio is 0 where one kind of neuron is missing,
    and 1, so that it adds nothing, where both are.

    Args:
        inputs: each layer with the box at its input; what is not before a ReLU does not count.

    Returns:
        0-dim tensor; its gradient is finite too.

    Raises:
        ValueError: there is no ReLU layer.

    >>> box = Interval(torch.tensor([[2.0, -2.0, -6.0]]), torch.ones(1, 3))
    >>> relu_balance([(nn.ReLU(), box)])  # centres 2 to 8, squared deviations 16 to 16
    tensor(0.5000)
    """
    boxes = _before_relus(inputs)
    tensors = [part.flatten() for box in boxes for part in (box.center, box.radius)]
    with without_autocast(*tensors) as parts:
        centers, radii = parts[::2], parts[1::2]
        of_layers = [torch.stack([center.mean(), center.abs().mean()]) for center in centers]
        means, sizes = of_all_processes(torch.stack(of_layers)).mean(0).unbind(1)
        # No ratio depends on the centres' common scale: a constant to the gradient.
        sizes = sizes.detach().clamp(min=_NOTHING)
        sums = list(map(_sums, centers, radii, means, sizes))
        of_active, of_inactive = of_all_processes(torch.stack(sums)).mean(0).unbind(1)
    smaller = torch.minimum(of_active, of_inactive)
    larger = torch.maximum(of_active, of_inactive)
    ratio = smaller / larger.clamp(min=_NOTHING)
    return _shortfall(torch.where(larger > _NOTHING, ratio, 1)).sum(1).mean()


def _before_relus(inputs: LayerInputs) -> list[Interval]:
    boxes = [box for layer, box in inputs if isinstance(layer, nn.ReLU)]
    if not boxes:
        raise ValueError("inputs: expected the box before a ReLU layer, found none")
    return boxes


def _sums(center: Tensor, radius: Tensor, mean: Tensor, size: Tensor) -> Tensor:
    """Sums of |centre| and of (centre - mean)², of active and of inactive neurons: ``(2, 2)``.

    Both in units of ``size`` and of the number of neurons; ``center`` and ``radius`` are flat.
    """
    # Masks as numbers: products are faster than selections.
    active, inactive = ((sign * center > radius).to(center) for sign in (1, -1))
    center, mean = center / size, mean / size
    deviation = (center - mean).square()
    sums = [active @ center, active @ deviation, -(inactive @ center), inactive @ deviation]
    return (torch.stack(sums) / len(center)).view(2, 2)


def _shortfall(ratio: Tensor) -> Tensor:
    return (TOLERANCE - ratio).relu() / TOLERANCE
