"""Boxes of tensors, as centre and radius (paper, section 2)."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """The box of all tensors x with ``|x - center| <= radius`` in each entry.

    ``center`` and ``radius`` (entries >= 0) share one shape, ``(batch, ...)`` for layers.
    """

    center: Tensor
    radius: Tensor

    @property
    def lower(self) -> Tensor:
        """The smallest value of each entry."""
        return self.center - self.radius

    @property
    def upper(self) -> Tensor:
        """The largest value of each entry."""
        return self.center + self.radius

    @property
    def magnitude(self) -> Tensor:
        """The largest absolute value of each entry."""
        return self.center.abs() + self.radius

    def select(self, images: Tensor) -> "Interval":
        """The boxes of some images, by index or mask."""
        return Interval(self.center[images], self.radius[images])

    @classmethod
    def between(cls, lower: Tensor, upper: Tensor) -> "Interval":
        """The box with the given bounds, ``lower <= upper``, of one shape.

        >>> Interval.between(torch.tensor([0.0]), torch.tensor([4.0]))
        Interval(center=tensor([2.]), radius=tensor([2.]))
        """
        return cls((upper + lower) / 2, (upper - lower) / 2)

    @classmethod
    def around(cls, x: Tensor, epsilon: float | Tensor) -> "Interval":
        """The l_inf ball S(x, ε) within the image domain [0, 1].

        Args:
            x: images in [0, 1], ``(batch, ...)``.
            epsilon: radius >= 0 in pixels of [0, 1]; a number or a 0-dim tensor, whose value
                is not looked at, so that it may live on a device without synchronising.

        Raises:
            ValueError: the number ``epsilon`` is below 0 or NaN.

        >>> Interval.around(torch.tensor([0.0, 0.5]), 0.5)
        Interval(center=tensor([0.2500, 0.5000]), radius=tensor([0.2500, 0.5000]))
        """
        return cls.between(*ball_ends(x, epsilon))


def ball_ends(
    x: Tensor, epsilon: float | Tensor, domain: tuple[float, float] = (0.0, 1.0)
) -> tuple[Tensor, Tensor]:
    """The lower and upper ends of the l_inf ball S(x, ε) within the domain, of the shape of x.

    Args:
        x: in the domain, of any shape.
        epsilon: radius >= 0: a number, a 0-dim tensor, or one like ``x``. A tensor's value is not
            looked at, so that it may live on a device without synchronising.
        domain: least and largest value that an entry may have.

    Raises:
        ValueError: the number ``epsilon`` is below 0 or NaN.

    >>> ball_ends(torch.tensor([0.0, 0.5]), 0.25)
    (tensor([0.0000, 0.2500]), tensor([0.2500, 0.7500]))
    """
    if not (isinstance(epsilon, Tensor) or epsilon >= 0):
        raise ValueError(f"epsilon must be at least 0, got {epsilon}")
    return (x - epsilon).clamp(*domain), (x + epsilon).clamp(*domain)


def check_images(x: Tensor) -> None:
    """See that images are in the domain [0, 1].

    Raises:
        ValueError: an entry is not, or is NaN.

    >>> check_images(torch.tensor([[0.0, 255.0]]))
    Traceback (most recent call last):
    ValueError: x: expected images in [0, 1], found values from 0.0 to 255.0
    """
    if not bool(((x >= 0) & (x <= 1)).all()):
        found = f"values from {x.min().item()} to {x.max().item()}"
        raise ValueError(f"x: expected images in [0, 1], found {found}")


@dataclass(frozen=True)
class Computed(Interval):
    """A box of what a network computes in floating point.

    Attributes:
        error: how far its values may be from what the layer before makes, in real numbers, of the
            computed values before it, entries >= 0; None for no distance. The box contains both.
    """

    error: Tensor | None

    def select(self, images: Tensor) -> "Computed":
        """The boxes of some images, by index or mask."""
        error = None if self.error is None else self.error[images]
        return Computed(self.center[images], self.radius[images], error)
