"""What a checkpoint says of training, taken over only as far as training can go on from it."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from robust_app.errors import shown


def epochs_done(state: Mapping[str, Any], total: int) -> int:
    """How many epochs it is after.

    Raises:
        LookupError, ValueError: it does not say, or a run of ``total`` epochs has not as many.
    """
    done = state["epochs_done"]
    if not isinstance(done, int) or not 0 <= done <= total:
        raise ValueError(f"epochs_done: expected 0 to {total}, found {shown(done)}")
    return done


def learning_rate_scale(state: Mapping[str, Any]) -> float:
    """What the schedule's learning rate is multiplied by; older runs do not say.

    Raises:
        ValueError: it is not in (0, 1].
    """
    scale = state.get("learning_rate_scale", 1.0)
    if not isinstance(scale, float) or not 0 < scale <= 1:
        raise ValueError(f"learning_rate_scale: expected 0 to 1, found {shown(scale)}")
    return scale


def has_moments(state: Mapping[str, Any]) -> bool:
    """Whether the optimizer has moments of the losses' gradients: two were trained on.

    Raises:
        LookupError, TypeError: it does not say.
    """
    return state["optimizer"]["moments"] is not None


def without_moments(state: Mapping[str, Any], decay: tuple[float, float]) -> dict[str, Any]:
    """The same before the first joint step of an optimizer whose moments decay by (β₁, β₂)."""
    none = {"moments": None, "moment_decay": list(decay)}
    return {**state, "optimizer": state["optimizer"] | none}


def restore_adam(optimizer: Optimizer, saved: Any) -> None:
    """Load the state of Adam, or of what wraps it, and keep the options.

    They are the configuration's: a run may go on on another device or by another execution.

    Raises:
        LookupError, ValueError, TypeError, AttributeError, RuntimeError: it is of another
            optimizer, or Adam could not step from it; torch's loading does not look.
    """
    if not isinstance(saved, dict) or not all(isinstance(g, dict) for g in saved["param_groups"]):
        raise TypeError("optimizer: expected mappings")
    pairs = zip(saved["param_groups"], optimizer.param_groups, strict=True)
    groups = [ours | {"params": theirs["params"]} for theirs, ours in pairs]
    optimizer.load_state_dict(saved | {"param_groups": groups})
    for parameter, state in optimizer.state.items():
        shapes = {name: getattr(value, "shape", None) for name, value in state.items()}
        moments = dict.fromkeys(("exp_avg", "exp_avg_sq"), parameter.shape)
        if shapes and shapes != {"step": torch.Size(), **moments}:
            raise ValueError(f"optimizer: expected Adam's state of {parameter.shape}")
        if shapes and not 0 <= state["step"].item() < math.inf:
            raise ValueError(f"optimizer: expected a number of steps, found {state['step']}")
