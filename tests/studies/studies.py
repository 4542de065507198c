"""The studies: what each compares, from which start, at which radii."""

from collections.abc import Sequence
from dataclasses import dataclass

from tests.studies.variations import (
    Variation,
    ablations,
    bisectors,
    changed_rules,
    shared_priorities,
    weighted_sums,
)


@dataclass(frozen=True)
class Study:
    """Variations of one recipe.

    Attributes:
        name: of its files.
        recipe: of :mod:`robust_app.recipes`.
        epochs: that its schedule is scaled to.
        settings: ``key=value`` on top of that.
        variations: what is compared.
        epsilons: radii of the last networks' errors, PGD at the first.
        seeds: of a run each.
        start: directory, among the runs, of the run whose last network all begin from.
        shared_epochs: see :class:`~tests.studies.running.Setup`.
    """

    name: str
    recipe: str
    epochs: int
    settings: Sequence[str]
    variations: Sequence[Variation]
    epsilons: tuple[float, ...] = (0.3, 0.4)
    seeds: Sequence[int] = (0, 1, 2)
    start: str | None = None
    shared_epochs: int = 0


# Three epochs at the full radius, with no warm-up, ramp or BatchNorm.
CONTINUED = (
    "batch_norm=false",
    "ibp_initialization=false",
    "box_regularizers=0.0",
    "natural_epochs=0",
    "ramp_epochs=0",
    "certified_epochs=0",
    "fosc_maximum=0.0",  # the certified loss goes first in conflict, as late in a paper's run
    "learning_rate=3e-4",
    "milestones=[1, 2]",
    "learning_rate_factor=0.3",
    "reference_fan_in=0",  # the recipe had none when it was carried out
    "first_batch_norm_frozen_from=inf",
    "precision=bf16",
    "pgd_steps=20",
)

STUDIES = {
    study.name: study
    for study in (
        Study(
            name="fronts",
            recipe="mnist-dm-small-short",
            epochs=3,
            settings=CONTINUED,
            variations=[
                *weighted_sums((1, 16), (1, 4), (1, 1), (2, 1), (4, 1), (8, 1), (16, 1)),
                *bisectors((1, 1), (1, 3), (1, 10)),
                *changed_rules((1, 1)),
                *shared_priorities(0.25, 0.5, 0.75),
            ],
            start="start",
        ),
        Study(
            name="ablations",
            recipe="mnist-dm-small-short",
            epochs=20,
            # The recipe's in a third of its 60 epochs, but for a ramp that is no shorter; as it was
            # when this was carried out, with one learning rate for all layers and this preference.
            settings=(
                "natural_epochs=0.3",
                "ramp_epochs=5.7",
                "certified_epochs=15",
                "milestones=[13.333333333333334, 17.333333333333332, 19]",
                "fosc_decay_epochs=17.666666666666668",
                "reference_fan_in=0",
                "first_batch_norm_frozen_from=inf",
                "preference=[1, 10]",
                "pgd_steps=20",
            ),
            shared_epochs=14,
            variations=ablations(),
            seeds=(0,),
        ),
    )
}
