"""Robustness as a property in VNN-LIB, as the verification competition VNN-COMP writes it."""

import numpy as np
from torch import Tensor

from robust_app.interval import ball_ends


def robustness(image: Tensor, label: int, epsilon: float, classes: int) -> str:
    """The property that holds where the image has a counterexample: what verifiers refute.

    Inputs X_i are the pixels in [0, 1] in the order (C, H, W), each within ε of the image's and
    within [0, 1]; outputs Y_j the logits, of which another is at least as large as the label's. A
    verifier's ``unsat`` means robust, its ``sat`` falsified.

    Args:
        image: in [0, 1], ``(C, H, W)``, as the network takes it; ε is added in float64.
        label: the true class.
        epsilon: l_inf radius >= 0 in pixels of [0, 1].
        classes: number of logits, at least 2.

    >>> print(robustness(torch.tensor([[[0.5]]]), 0, 0.25, classes=3))
    ; class 0, l_inf radius 0.25 in pixels of [0, 1]
    (declare-const X_0 Real)
    (declare-const Y_0 Real)
    (declare-const Y_1 Real)
    (declare-const Y_2 Real)
    (assert (>= X_0 0.25))
    (assert (<= X_0 0.75))
    (assert (or
      (and (>= Y_1 Y_0))
      (and (>= Y_2 Y_0))
    ))
    """
    pixels = image.flatten().double()
    lower, upper = ball_ends(pixels, epsilon)
    lines = [f"; class {label}, l_inf radius {epsilon} in pixels of [0, 1]"]
    lines += [f"(declare-const X_{i} Real)" for i in range(len(pixels))]
    lines += [f"(declare-const Y_{j} Real)" for j in range(classes)]
    for i, (least, most) in enumerate(zip(lower.tolist(), upper.tolist(), strict=True)):
        lines += [f"(assert (>= X_{i} {_decimal(least)}))", f"(assert (<= X_{i} {_decimal(most)}))"]
    others = [j for j in range(classes) if j != label]
    lines += ["(assert (or", *(f"  (and (>= Y_{j} Y_{label}))" for j in others), "))"]
    return "\n".join(lines)


def _decimal(value: float) -> str:
    """All digits of a float64, without an exponent, which the format does not have."""
    return np.format_float_positional(value, trim="0")
