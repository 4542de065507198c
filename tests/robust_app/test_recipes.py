"""The recipes of the package against appendix A.5 of the paper and the tables they refer to."""

import dataclasses
import itertools
import math
import tomllib

import pytest

from robust_app import method_settings, methods, recipes
from robust_app.config import Config
from robust_app.data import DATASETS, load
from robust_app.errors import UserError
from robust_app.models import MODELS
from robust_app.schedules import Phase, fosc_threshold, phase, setting, smoothed_ramp, step_decay

SIZES = ("small", "medium", "large")
MNIST = {"0.1": 0.2, "0.2": 0.4, "0.3": 0.4, "0.4": 0.4}  # ε to ε_train (A.5, Table 4)
CIFAR10 = {f"{n}-255": 1.1 * n / 255 for n in (2, 8, 16)}
ATTACKED = ("fgsm", "fgsm-random", "pgd", "latent-adversarial")


def every() -> list[tuple[str, Config]]:
    return [(name, recipes.load(name)) for name in recipes.names()]


def test_the_recipes_are_three_families():
    assert recipes.names() == sorted(recipes.names())
    assert {name.split("-")[0] for name in recipes.names()} == {"digits", "mnist", "cifar10"}
    assert len(set(recipes.names())) == len(recipes.names())
    for family in recipes.families():
        counts = [len(family.choices(kind)) for kind in recipes.KINDS]
        models, epsilons, with_methods, schedules = counts
        # The authors' schedule is there for their own method alone.
        authors = "authors" in family.choices("schedule")
        expected = models * epsilons * (with_methods * (schedules - authors) + authors)
        assert sum(name.startswith(family.name) for name in recipes.names()) == expected


def test_every_recipe_names_what_exists_and_passes_the_checks_of_its_method():
    for name, config in every():
        method_settings.check(config)
        assert config.dataset in DATASETS, name
        assert config.model in MODELS, name
        assert config.method in methods.METHODS, name


def test_every_method_and_model_has_a_recipe():
    configs = [config for _, config in every()]
    assert {config.method for config in configs} == set(methods.METHODS)
    assert {config.model for config in configs} == set(MODELS)


def test_every_recipe_is_described_in_a_line_of_its_own():
    descriptions = [recipes.description(name) for name in recipes.names()]
    assert len(set(descriptions)) == len(descriptions)
    for description in descriptions:
        assert 0 < len(description) < 120
        assert description.isprintable()
        assert '"' not in description  # it is printed as a TOML string


def test_every_recipe_ends_at_full_strength():
    for name, config in every():
        main = config.epochs - config.natural_epochs - config.adversarial_epochs
        assert phase(config.epochs, config.natural_epochs, config.adversarial_epochs) is Phase.MAIN
        assert smoothed_ramp(main, config.ramp_epochs) == 1, name
        assert fosc_threshold(main, 1.0, config.ramp_epochs, config.fosc_decay_epochs) == 0, name
        assert all(milestone < config.epochs for milestone in config.milestones), name
        assert all(milestone < config.stage_epochs for milestone in config.stage_milestones), name
        assert config.evaluation_epsilon <= config.epsilon, name
        last = setting(config, config.epochs - 1e-6)
        assert last.phase is Phase.MAIN
        assert last.box_regularizers == 0


def test_methods_that_do_not_certify_use_no_regularisers_of_boxes_nor_a_ramp():
    for name, config in every():
        if "certified" not in (losses := methods.find(config.method).losses):
            certifies = "mixed" in losses
            assert certifies or (config.ramp_epochs, config.box_regularizers) == (0, 0), name


# --- The names


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("mnist", "mnist-dm-small-0.3-advibp-paper"),
        ("mnist-dm-large", "mnist-dm-large-0.3-advibp-paper"),
        ("mnist-0.1", "mnist-dm-small-0.1-advibp-paper"),
        ("mnist-pgd", "mnist-dm-small-0.3-pgd-paper"),
        ("mnist-short", "mnist-dm-small-0.3-advibp-short"),
        ("mnist-cnn7-0.4-short", "mnist-cnn7-0.4-advibp-short"),
        ("cifar10", "cifar10-dm-small-8-255-advibp-paper"),
        ("cifar10-dm-large-2-255", "cifar10-dm-large-2-255-advibp-paper"),
        ("cifar10-16-255-authors", "cifar10-dm-small-16-255-advibp-authors"),
    ],
)
def test_a_short_name_is_a_full_one(short, full):
    assert full in recipes.names()
    assert short not in recipes.names()
    assert recipes.load(short) == recipes.load(full)
    assert recipes.description(short) == recipes.description(full)


@pytest.mark.parametrize("family", recipes.families(), ids=lambda family: family.name)
def test_what_a_name_leaves_out_is_the_default(family):
    kinds = ("model", "epsilon", "method", "schedule")
    default = "-".join((family.name, *(family.default(kind) for kind in kinds)))
    for kind in kinds:
        for choice in family.choices(kind):
            full = default.replace(family.default(kind), choice)
            assert recipes.load(f"{family.name}-{choice}") == recipes.load(full)


def test_the_authors_schedule_is_for_their_method_alone():
    assert "mnist-dm-small-0.3-advibp-authors" in recipes.names()
    with pytest.raises(UserError, match=r"^unknown recipe 'mnist-ibp-authors'"):
        recipes.load("mnist-ibp-authors")


@pytest.mark.parametrize("name", ["digits", "mnist-dm-large-0.1-crown-ibp-short", "cifar10-pgd"])
def test_a_recipe_as_toml_is_the_same_recipe(name, tmp_path):
    config = recipes.load(name)
    (tmp_path / "same.toml").write_text(config.to_toml(), encoding="utf-8")
    assert recipes.load(tmp_path / "same.toml") == config
    assert Config.from_mapping(tomllib.loads(config.to_toml())) == config


# --- The paper's schedule (A.5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("epsilon", MNIST)
def test_mnist_has_the_numbers_of_the_paper(size, epsilon):
    config = recipes.load(f"mnist-dm-{size}-{epsilon}")
    assert (config.dataset, config.model, config.method) == ("mnist", f"dm-{size}", "advibp")
    assert (config.epsilon, config.evaluation_epsilon) == (MNIST[epsilon], float(epsilon))
    assert (config.natural_epochs, config.adversarial_epochs) == (10, 40)
    assert config.epochs == 10 + 40 + 200
    assert (config.ramp_epochs, config.fosc_decay_epochs) == (50, 50)
    assert config.fosc_maximum == (1e-5 if config.epsilon == 0.2 else 1e-4)
    rates = [
        step_decay(t, config.learning_rate, config.milestones, config.learning_rate_factor)
        for t in (149, 150, 200)
    ]
    assert rates == pytest.approx([5e-4, 1.25e-4, 3.125e-5])
    assert (config.batch_size, config.moment_decay) == (256, (0.9, 0.99))
    assert (config.gradient_clip, config.augment, config.held_out) == (math.inf, False, 5000)
    assert config.pgd_steps == 200
    assert (config.regularization, config.attack_step) == (0.5, 1.25)
    assert_the_papers_method(config)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("epsilon", CIFAR10)
def test_cifar10_has_the_numbers_of_the_paper(size, epsilon):
    config = recipes.load(f"cifar10-dm-{size}-{epsilon}")
    assert (config.dataset, config.model, config.method) == ("cifar10", f"dm-{size}", "advibp")
    assert config.epsilon == pytest.approx(CIFAR10[epsilon], rel=1e-15)
    assert config.evaluation_epsilon == int(epsilon.removesuffix("-255")) / 255
    assert (config.natural_epochs, config.adversarial_epochs, config.epochs) == (400, 410, 3200)
    assert (config.ramp_epochs, config.fosc_decay_epochs) == (1000, 280)
    assert config.fosc_maximum == (1e-5 if epsilon == "2-255" else 1e-3)
    rates = [
        step_decay(t, config.learning_rate, config.milestones, config.learning_rate_factor)
        for t in (2199, 2200, 2700)
    ]
    assert rates == pytest.approx([5e-4, 5e-5, 5e-6])
    assert (config.batch_size, config.moment_decay) == (256, (0.9, 0.99))
    assert (config.gradient_clip, config.augment, config.held_out) == (math.inf, True, 5000)
    assert (config.pgd_steps, config.crop_padding) == (200, 4)
    assert_the_papers_method(config)


def assert_the_papers_method(config: Config) -> None:
    """No departure from Algorithm 2 that the text does not name."""
    departures = ("batch_norm", "ibp_initialization", "box_regularizers", "certified_epochs")
    for name in (*departures, "authors_weights", "one_start_per_batch", "reference_fan_in"):
        assert not getattr(config, name)


@pytest.mark.parametrize(
    ("name", "epochs", "rates"),
    [
        # "start with 1.25e-4 and train 250 epochs each layer [...] 4x at 50, 100 and 200 epoch"
        ("mnist", 250, {0: 1.25e-4, 50: 1.25e-4 / 4, 100: 1.25e-4 / 16, 200: 1.25e-4 / 64}),
        # "start with 5e-5 and train 3200 epochs each layer [...] by 10x every 1000 epochs"
        ("cifar10", 3200, {0: 5e-5, 1000: 5e-6, 2000: 5e-7, 3000: 5e-8}),
    ],
)
def test_the_layer_wise_stages_of_the_paper(name, epochs, rates):
    config = dataclasses.replace(recipes.load(name), stages=1)
    assert config.total_epochs == config.epochs + epochs
    for t, rate in rates.items():
        now = setting(config, config.epochs + t)
        assert (now.stage, now.epsilon, now.fosc_threshold) == (1, config.epsilon, 0)
        assert now.learning_rate == pytest.approx(rate)


def test_only_latent_adversarial_training_has_stages_unless_asked_for():
    for name, config in every():
        assert (config.stages > 0) == (config.method == "latent-adversarial"), name


@pytest.mark.parametrize("data", ["mnist", "cifar10"])
def test_the_sizes_differ_in_the_model_alone(data):
    small, medium, large = (recipes.load(f"{data}-dm-{size}") for size in SIZES)
    assert dataclasses.replace(medium, model="dm-small") == small
    assert dataclasses.replace(large, model="dm-small") == small


@pytest.mark.parametrize(
    ("data", "epsilon"),
    [*itertools.product(["mnist"], MNIST), *itertools.product(["cifar10"], CIFAR10)],
)
@pytest.mark.parametrize("schedule", ["paper", "short"])
def test_radii_trained_at_are_those_of_their_rows(data, epsilon, schedule):
    radii = MNIST | CIFAR10
    for method in methods.METHODS:
        config = recipes.load(f"{data}-dm-medium-{epsilon}-{method}-{schedule}")
        if method in ATTACKED:  # these are trained at the radius evaluated at
            assert config.epsilon == config.evaluation_epsilon
        else:
            assert config.epsilon == pytest.approx(radii[epsilon], rel=1e-15)


@pytest.mark.parametrize(
    ("data", "epochs", "natural", "ramp"), [("mnist", 200, 10, 50), ("cifar10", 3200, 320, 1600)]
)
@pytest.mark.parametrize("method", ["ibp", "crown-ibp"])
def test_schedules_of_the_methods_compared_with(data, epochs, natural, ramp, method):
    config = recipes.load(f"{data}-{method}")
    assert (config.epochs, config.adversarial_epochs) == (epochs, 0)
    assert (config.natural_epochs, config.ramp_epochs) == (natural, ramp)
    natural_weights = {"mnist": (1, 0), "cifar10": (0, 0)}
    assert config.natural_weight == ((1, 0.5) if method == "ibp" else natural_weights[data])
    assert config.crown_share == (1, 0)
    assert config.learning_rate_factor == 0.1


def test_crown_ibp_at_the_small_radii_has_schedules_of_its_own():
    config = recipes.load("mnist-0.1-crown-ibp")
    assert (config.epochs, config.natural_epochs, config.ramp_epochs) == (100, 3, 18)
    assert (config.batch_size, config.learning_rate, config.milestones) == (100, 1e-3, (25, 42))
    config = recipes.load("cifar10-2-255-crown-ibp")
    assert (config.batch_size, config.crown_share) == (1024, (1, 1))


# --- The other schedules


@pytest.mark.parametrize(
    ("name", "warm_up"), [("mnist-dm-small-0.3", 50), ("cifar10-dm-large-8-255", 810)]
)
def test_the_authors_schedule_does_what_their_code_does(name, warm_up):
    paper, authors = recipes.load(name), recipes.load(f"{name}-advibp-authors")
    # ε is 0 in what the paper calls the adversarial warm-up: plain natural training.
    assert (authors.natural_epochs, authors.adversarial_epochs) == (warm_up, 0)
    assert authors.certified_epochs == authors.ramp_epochs
    assert authors.authors_weights
    assert authors.one_start_per_batch
    # Their FOSC is of the batch-mean loss's gradient: 1/256 of the paper's.
    assert authors.fosc_maximum == pytest.approx(256 * 1e-4)
    smaller = recipes.load("mnist-dm-small-0.1-advibp-authors")
    assert smaller.fosc_maximum == pytest.approx(256 * 1e-5)
    fields = ("natural_epochs", "adversarial_epochs", "certified_epochs", "authors_weights")
    changed = (*fields, "one_start_per_batch", "fosc_maximum")
    same = {field: getattr(paper, field) for field in changed}
    assert dataclasses.replace(authors, **same) == paper
    moments = [setting(authors, t) for t in (0, warm_up - 0.1, warm_up, warm_up + 10)]
    assert [now.epsilon for now in moments[:3]] == [0, 0, 0]
    assert [now.phase.value for now in moments] == ["natural"] * 2 + ["certified"] * 2
    ramped = setting(authors, warm_up + authors.ramp_epochs)
    assert (ramped.phase, ramped.epsilon) == (Phase.MAIN, authors.epsilon)


@pytest.mark.parametrize(
    ("data", "epochs", "ramp", "batch_size", "milestones"),
    [("mnist", 70, 20, 256, (50, 60)), ("cifar10", 160, 80, 128, (120, 140))],
)
def test_the_short_schedule_is_that_of_shi_et_al(data, epochs, ramp, batch_size, milestones):
    config = recipes.load(f"{data}-cnn7-ibp-short")
    assert (config.epochs, config.natural_epochs, config.adversarial_epochs) == (epochs, 1, 0)
    assert (config.ramp_epochs, config.batch_size) == (ramp, batch_size)
    assert (config.milestones, config.learning_rate_factor) == (milestones, 0.2)
    assert config.batch_norm
    assert config.ibp_initialization
    assert (config.box_regularizers, config.gradient_clip) == (0.5, 10.0)
    if data == "cifar10":
        assert config.crop_padding == 2
    # "weight 0.5 (1 - ε / ε_max)"
    for t in (0, 1, 1 + ramp / 2, 1 + ramp):
        now = setting(config, t)
        assert now.box_regularizers == pytest.approx(0.5 * (1 - now.epsilon / config.epsilon))


@pytest.mark.parametrize("model", ["dm-small", "dm-large"])
def test_the_short_schedule_ends_with_both_losses_after_the_learning_rate_has_fallen(model):
    for method in ("advibp", "advcrown-ibp", "weighted-sum"):
        config = recipes.load(f"mnist-{model}-{method}-short")
        assert setting(config, 105.2).phase is Phase.CERTIFIED
        joint = setting(config, 105.4)
        assert joint.phase is Phase.MAIN
        assert joint.learning_rate == pytest.approx(0.2 * config.learning_rate)
        assert joint.epsilon == config.epsilon
        assert 0.1 < joint.fosc_threshold < 0.2
        assert setting(config, 119.3).fosc_threshold == pytest.approx(0, abs=1e-12)
        assert (config.epochs, config.milestones) == (120, (100, 112, 117))  # in 15 both losses
        frozen = [setting(config, t).first_batch_norm_frozen for t in (39.9, 40)]
        assert (config.batch_norm, frozen) == (True, [False, True])
        assert config.preference == (1, 1)  # the paper's bisector
    assert recipes.load(f"mnist-{model}-ibp-short").certified_epochs == 0


@pytest.mark.parametrize("radius", ["2-255", "8-255", "16-255"])
@pytest.mark.parametrize("model", ["dm-small", "dm-large"])
def test_the_short_schedule_of_cifar10_ends_with_both_losses_too(model, radius):
    for method in ("advibp", "advcrown-ibp", "weighted-sum"):
        config = recipes.load(f"cifar10-{model}-{radius}-{method}-short")
        phases = [setting(config, t).phase for t in (140.9, 141.1)]
        assert phases == [Phase.CERTIFIED, Phase.MAIN]
        assert [setting(config, t).epsilon == config.epsilon for t in (40.9, 41)] == [False, True]
        assert setting(config, 141.1).learning_rate == pytest.approx(0.04 * 1e-3)


def test_what_is_tuned_for_three_networks_is_in_no_other_recipe():
    for name, config in every():
        tuned = name.startswith(("mnist-", "cifar10-")) and name.endswith("-short")
        tuned = tuned and config.model in ("dm-small", "dm-medium", "dm-large")
        assert config.reference_fan_in == (256 if tuned else 0), name
        both = config.method in ("advibp", "advcrown-ibp", "weighted-sum")
        frozen_from = 40 if tuned and both and name.startswith("mnist-") else math.inf
        assert config.first_batch_norm_frozen_from == frozen_from, name


def test_the_short_schedule_of_other_networks_is_that_of_shi_et_al():
    assert recipes.load("mnist-cnn-small-short").epochs == 70  # DM-Small's is of 120


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
@pytest.mark.parametrize("size", ["dm-medium", "dm-large"])
@pytest.mark.parametrize("method", methods.METHODS)
def test_larger_dm_networks_take_over_the_short_schedule_of_dm_small(method, size, dataset):
    small, larger = (
        recipes.load(f"{dataset}-{name}-{method}-short") for name in ("dm-small", size)
    )
    assert dataclasses.replace(larger, model="dm-small") == small


def test_images_of_digits_are_never_flipped():
    for name, config in every():
        assert config.horizontal_flip == name.startswith("cifar10"), name


def test_digits_leaves_whole_batches_to_train_on():
    config = recipes.load("digits")
    assert len(load("digits").x_train) - config.held_out >= config.batch_size
