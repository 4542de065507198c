import dataclasses
import math
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_app import recipes
from robust_app.config import Config
from robust_app.errors import UserError, shown, unknown
from robust_app.overrides import fraction, override, with_epochs
from robust_app.precision import PRECISIONS
from robust_app.run_directory import RunDirectory

DIGITS = recipes.load("digits")
RECIPES = {recipes.load(name) for name in recipes.names() if "-table-f-" not in name}
FIELDS = [field.name for field in dataclasses.fields(Config)]

texts = st.text("a:/.é😀 '\"\\#=,[]{}", min_size=1)  # what TOML gives a meaning, and beyond ASCII
units = st.floats(0, 1)
counts = st.integers(1, 2**63 - 1)
attempts = st.integers(1, 10**6)
durations = st.floats(0, 3.4e38)
above_zero = st.floats(0, 3.4e38, exclude_min=True)
rates = st.floats(0, 1e30, exclude_min=True)
configs = st.builds(
    Config,
    dataset=texts,
    model=texts,
    batch_norm=st.booleans(),
    first_batch_norm_frozen_from=st.floats(1),
    ibp_initialization=st.booleans(),
    method=texts,
    epsilon=units,
    evaluation_epsilon=units,
    epochs=counts,
    batch_size=counts,
    learning_rate=rates,
    reference_fan_in=durations,
    milestones=st.lists(durations, max_size=4),
    learning_rate_factor=st.floats(0, 1, exclude_min=True),
    natural_epochs=st.floats(0, 0.25),  # together at most one epoch: they fit into any run
    adversarial_epochs=st.floats(0, 0.25),
    ramp_epochs=st.floats(0, 0.5),
    certified_epochs=st.floats(0, 0.5),
    fosc_maximum=durations,
    fosc_decay_epochs=durations,
    moment_decay=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
    regularization=durations,
    preference=st.tuples(above_zero, above_zero),
    authors_weights=st.booleans(),
    natural_weight=st.tuples(units, units),
    crown_share=st.tuples(units, units),
    box_regularizers=durations,
    attack_step=above_zero,
    attack_steps=attempts,
    one_start_per_batch=st.booleans(),
    stages=counts,
    stage_epochs=counts,
    stage_learning_rate=rates,
    stage_milestones=st.lists(durations, max_size=4),
    gradient_clip=st.floats(0, exclude_min=True),
    augment=st.booleans(),
    crop_padding=counts,
    horizontal_flip=st.booleans(),
    precision=st.sampled_from(PRECISIONS),
    held_out=counts,
    pgd_steps=attempts,
    pgd_restarts=attempts,
    seed=counts,
)


@settings(max_examples=50)
@given(configs)
def test_a_config_survives_toml(config):
    assert Config.from_mapping(tomllib.loads(config.to_toml())) == config


def test_toml_has_a_line_for_every_field():
    lines = DIGITS.to_toml().splitlines()
    assert [line.split(" = ")[0] for line in lines] == FIELDS
    assert (
        "gradient_clip = inf"
        in dataclasses.replace(DIGITS, gradient_clip=math.inf).to_toml().splitlines()
    )


def test_numbers_and_lists_take_the_type_of_their_field():
    config = dataclasses.replace(DIGITS, epsilon=0, milestones=[1, 2], moment_decay=[0, 0])
    assert isinstance(config.epsilon, float)
    assert config.milestones == (1.0, 2.0)
    assert config.moment_decay == (0.0, 0.0)
    assert all(isinstance(x, float) for x in (*config.milestones, *config.moment_decay))
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize(
    ("name", "value", "expectation"),
    [
        ("dataset", "", "a non-empty printable string"),
        ("dataset", "two\nlines", "a non-empty printable string"),
        ("model", 3, "a non-empty printable string"),
        ("method", None, "a non-empty printable string"),
        ("epsilon", -0.01, "a number in [0, 1]"),
        ("epsilon", 8, "a number in [0, 1]"),
        ("epsilon", math.nan, "a number in [0, 1]"),
        ("epsilon", "0.1", "a number in [0, 1]"),
        ("evaluation_epsilon", True, "a number in [0, 1]"),
        ("epochs", 0, "an integer of at least 1, of 64 bits"),
        ("epochs", 2.0, "an integer of at least 1, of 64 bits"),
        ("epochs", True, "an integer of at least 1, of 64 bits"),
        ("batch_size", 0, "an integer of at least 1, of 64 bits"),
        ("learning_rate", 0, "a number above 0, up to 1e30"),
        ("learning_rate", 1e31, "a number above 0, up to 1e30"),
        ("learning_rate", math.inf, "a number above 0, up to 1e30"),
        ("learning_rate", 10**400, "a number above 0, up to 1e30"),
        ("gradient_clip", 10**400, "a number above 0, or inf"),
        ("milestones", 30, "a list of at most 1000 numbers from 0 to 3.4e38"),
        ("milestones", [30, -1], "a list of at most 1000 numbers from 0 to 3.4e38"),
        ("milestones", [math.inf], "a list of at most 1000 numbers from 0 to 3.4e38"),
        ("milestones", [1] * 1001, "a list of at most 1000 numbers from 0 to 3.4e38"),
        ("learning_rate_factor", 0, "a number in (0, 1]"),
        ("learning_rate_factor", 4, "a number in (0, 1]"),
        ("natural_epochs", -1, "a number from 0 to 3.4e38"),
        ("adversarial_epochs", math.inf, "a number from 0 to 3.4e38"),
        ("ramp_epochs", math.nan, "a number from 0 to 3.4e38"),
        ("fosc_maximum", -1e-9, "a number from 0 to 3.4e38"),
        ("fosc_decay_epochs", False, "a number from 0 to 3.4e38"),
        ("moment_decay", (0.9,), "two numbers in [0, 1), such as [0.9, 0.99]"),
        ("moment_decay", (0.9, 1), "two numbers in [0, 1), such as [0.9, 0.99]"),
        ("moment_decay", 0.9, "two numbers in [0, 1), such as [0.9, 0.99]"),
        ("regularization", -0.5, "a number from 0 to 3.4e38"),
        ("preference", (1, 0), "two numbers above 0, up to 3.4e38, such as [4, 1]"),
        ("preference", (1, math.inf), "two numbers above 0, up to 3.4e38, such as [4, 1]"),
        ("preference", 2.0, "two numbers above 0, up to 3.4e38, such as [4, 1]"),
        ("batch_norm", 0, "true or false"),
        ("ibp_initialization", "yes", "true or false"),
        ("certified_epochs", -1.0, "a number from 0 to 3.4e38"),
        ("authors_weights", None, "true or false"),
        ("one_start_per_batch", 1, "true or false"),
        ("precision", "fp16", "float32, tf32 or bf16"),
        ("precision", 32, "float32, tf32 or bf16"),
        ("natural_weight", 0.5, "two numbers in [0, 1], such as [1, 0]"),
        ("natural_weight", (1, 0, 0), "two numbers in [0, 1], such as [1, 0]"),
        ("natural_weight", (1, -0.1), "two numbers in [0, 1], such as [1, 0]"),
        ("crown_share", (1.5, 0), "two numbers in [0, 1], such as [1, 0]"),
        ("crown_share", (True, 0), "two numbers in [0, 1], such as [1, 0]"),
        ("reference_fan_in", -1, "a number from 0 to 3.4e38"),
        ("box_regularizers", -1, "a number from 0 to 3.4e38"),
        ("attack_step", 0, "a number above 0, up to 3.4e38"),
        ("attack_steps", 0, "an integer from 1 to 1000000"),
        ("stages", -1, "an integer of at least 0, of 64 bits"),
        ("stages", 1.5, "an integer of at least 0, of 64 bits"),
        ("stage_epochs", 0, "an integer of at least 1, of 64 bits"),
        ("stage_learning_rate", 0, "a number above 0, up to 1e30"),
        ("stage_milestones", [-1], "a list of at most 1000 numbers from 0 to 3.4e38"),
        ("crop_padding", -1, "an integer of at least 0, of 64 bits"),
        ("first_batch_norm_frozen_from", 0.5, "a number of at least 1, or inf"),
        ("first_batch_norm_frozen_from", math.nan, "a number of at least 1, or inf"),
        ("gradient_clip", 0, "a number above 0, or inf"),
        ("gradient_clip", math.nan, "a number above 0, or inf"),
        ("augment", 1, "true or false"),
        ("horizontal_flip", 0, "true or false"),
        ("held_out", -1, "an integer of at least 0, of 64 bits"),
        ("pgd_steps", 0, "an integer from 1 to 1000000"),
        ("pgd_steps", 10**6 + 1, "an integer from 1 to 1000000"),
        ("pgd_restarts", 0, "an integer from 1 to 1000000"),
        ("seed", -1, "an integer of at least 0, of 64 bits"),
        ("seed", 2**63, "an integer of at least 0, of 64 bits"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name, value, expectation):
    with pytest.raises(UserError) as error:
        dataclasses.replace(DIGITS, **{name: value})
    assert str(error.value) == f"{name}: expected {expectation}, found {shown(value)}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epsilon", 0),
        ("epsilon", 1),
        ("milestones", []),
        ("learning_rate_factor", 1),
        ("natural_epochs", 0),
        ("moment_decay", (0, math.nextafter(1, 0))),
        ("natural_weight", (0, 1)),
        ("crown_share", (1, 0)),
        ("stages", 0),
        ("crop_padding", 0),
        ("first_batch_norm_frozen_from", 1),
        ("first_batch_norm_frozen_from", math.inf),
        ("gradient_clip", math.inf),
        ("held_out", 0),
        ("seed", 0),
        ("learning_rate", 5e-324),
    ],
)
def test_the_ends_of_a_range_are_taken(name, value):
    found = getattr(dataclasses.replace(DIGITS, **{name: value}), name)
    assert found == (tuple(value) if isinstance(value, list) else value)


def test_an_unknown_key_names_the_nearest_one():
    with pytest.raises(UserError, match=r"^unknown key 'learningrate'.* 'learning_rate'$"):
        Config.from_mapping(dataclasses.asdict(DIGITS) | {"learningrate": 1})


def test_missing_keys_are_named():
    values = dataclasses.asdict(DIGITS)
    del values["epsilon"], values["seed"], values["moment_decay"]  # the last has a default
    with pytest.raises(UserError, match=r"^missing keys: epsilon, seed$"):
        Config.from_mapping(values)


def test_what_the_paper_fixes_has_a_default():
    values = dataclasses.asdict(DIGITS)
    fixed = ("moment_decay", "regularization", "preference", "attack_step")
    departures = ("batch_norm", "ibp_initialization", "certified_epochs", "authors_weights")
    beyond = ("one_start_per_batch", "box_regularizers", "stages", "reference_fan_in")
    for name in (*fixed, *departures, *beyond):
        del values[name]
    config = Config.from_mapping(values)
    assert config.moment_decay == (0.9, 0.99)
    assert (config.regularization, config.attack_step) == (0.5, 1.25)
    assert config.preference == (1, 1)
    assert not any(getattr(config, name) for name in (*departures, *beyond))
    assert config.total_epochs == config.epochs


def test_unknown_always_suggests_something():
    assert "'seed'" in str(unknown("key", "zzz", ["seed"]))


def test_override_reads_values_as_toml_and_the_rest_as_strings():
    config = override(
        DIGITS,
        [
            "epsilon=0.25",
            "milestones=[1, 2.5]",
            "augment = true",
            "gradient_clip=inf",
            "model=dm-small",
            'method="weighted-sum"',
            "dataset=npz:/a folder/b=c#d.npz",
        ],
    )
    assert config.epsilon == 0.25
    assert config.milestones == (1.0, 2.5)
    assert config.augment is True
    assert config.gradient_clip == math.inf
    assert (config.model, config.method) == ("dm-small", "weighted-sum")
    assert config.dataset == "npz:/a folder/b=c#d.npz"
    assert (config.epochs, config.seed) == (DIGITS.epochs, DIGITS.seed)


def test_a_fraction_is_a_number_and_a_path_is_not():
    assert fraction("8/255") == 8 / 255
    config = override(DIGITS, ["epsilon=8/255", "dataset=npz:1/2", "learning_rate=1/0.5e3"])
    assert (config.epsilon, config.learning_rate) == (8 / 255, 1 / 500)
    assert config.dataset == "npz:1/2"


def test_the_last_override_of_a_key_wins_and_none_changes_nothing():
    assert override(DIGITS, ["seed=1", "seed=2"]).seed == 2
    assert override(DIGITS, []) == DIGITS


@settings(max_examples=50)
@given(configs)
def test_every_line_of_toml_is_an_override(config):
    assert override(DIGITS, config.to_toml().splitlines()) == config


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("epsilon", r"^--set: expected key=value, found 'epsilon'$"),
        ("epsilom=1", r"^unknown key 'epsilom'; the nearest known is 'epsilon'$"),
        ("=1", r"^unknown key ''"),
        ("epsilon=", r"^epsilon: expected a number in \[0, 1\], found ''$"),
        ("epsilon=small", r"found 'small'$"),
        ("epochs=1979-05-27", r"^epochs: .*found datetime.date"),
        ("model=1", r"^model: .*found 1$"),
        ("epochs=1\nseed=7", r"^epochs: .*found '1\\nseed=7'$"),
    ],
)
def test_a_bad_override_is_refused_in_one_line(assignment, message):
    with pytest.raises(UserError, match=message) as error:
        override(DIGITS, [assignment])
    assert "\n" not in str(error.value)


def test_with_epochs_scales_the_schedule_and_nothing_else():
    long = recipes.load("mnist-dm-small")
    short = with_epochs(long, 25)
    assert (short.epochs, short.natural_epochs, short.adversarial_epochs) == (25, 1.0, 4.0)
    assert (short.ramp_epochs, short.fosc_decay_epochs) == (5.0, 5.0)
    assert short.milestones == (15.0, 20.0)
    assert with_epochs(short, 250) == long


@given(st.integers(1, 10_000))
def test_with_epochs_keeps_the_shares_of_the_run(epochs):
    config = with_epochs(DIGITS, epochs)
    assert config.ramp_epochs / epochs == pytest.approx(DIGITS.ramp_epochs / DIGITS.epochs)
    assert config.milestones[0] / epochs == pytest.approx(DIGITS.milestones[0] / DIGITS.epochs)


@pytest.mark.parametrize(("epochs", "since"), [(80, 20), (10, 2.5), (4, 1), (1, 1)])
def test_with_epochs_freezes_no_statistics_before_there_are_some(epochs, since):
    config = dataclasses.replace(DIGITS, first_batch_norm_frozen_from=DIGITS.epochs / 4)
    assert DIGITS.epochs == 40
    assert with_epochs(config, epochs).first_batch_norm_frozen_from == since


def test_with_epochs_of_the_same_length_changes_nothing():
    for config in RECIPES:
        assert with_epochs(config, config.epochs) == config


def test_with_epochs_stretches_the_stages_to_whole_epochs():
    long = dataclasses.replace(
        recipes.load("mnist-dm-small"), stages=2, stage_epochs=30, stage_milestones=(10, 20)
    )
    assert long.total_epochs == 250 + 2 * 30
    half = with_epochs(long, 125)
    assert (half.stages, half.stage_epochs, half.stage_milestones) == (2, 15, (5.0, 10.0))
    assert half.total_epochs == 125 + 2 * 15
    assert half.stage_learning_rate == long.stage_learning_rate


@given(st.integers(1, 1000))
def test_with_epochs_keeps_the_shares_of_a_stage(epochs):
    config = dataclasses.replace(DIGITS, stage_epochs=30, stage_milestones=(10.0, 20.0))
    changed = with_epochs(config, epochs)
    assert changed.stage_epochs == max(1, round(30 * epochs / DIGITS.epochs))  # never none
    shares = [milestone / changed.stage_epochs for milestone in changed.stage_milestones]
    assert shares == pytest.approx([1 / 3, 2 / 3])


def test_the_longest_lists_can_be_written_and_read(tmp_path):
    numbers = [math.nextafter(3e37, math.inf) * (1 + i / 1000) for i in range(1000)]
    both = {"milestones": numbers, "stage_milestones": numbers}
    config = dataclasses.replace(DIGITS, **both)
    directory = RunDirectory(tmp_path)
    directory.write_config(config)
    assert directory.config() == config
    assert override(DIGITS, [f"{name}={numbers}" for name in both]) == config


@pytest.mark.parametrize("epochs", [0, -3, 2.5])
def test_with_epochs_refuses_what_is_no_number_of_epochs(epochs):
    with pytest.raises(UserError, match=r"^epochs: expected an integer of at least 1"):
        with_epochs(DIGITS, epochs)


def test_a_recipe_file_is_read_with_its_description(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('description = "ε of my own"\n' + DIGITS.to_toml(), encoding="utf-8")
    assert recipes.load(path) == recipes.load(str(path)) == DIGITS
    assert recipes.description(path) == "ε of my own"


def test_a_resolved_config_is_a_recipe_without_description(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(DIGITS.to_toml(), encoding="utf-8")
    assert recipes.load(path) == DIGITS
    assert recipes.description(path) == ""


def test_an_unknown_recipe_names_the_nearest_one():
    with pytest.raises(UserError, match=r"^unknown recipe 'mnist-small'.* 'mnist-dm-small'$"):
        recipes.load("mnist-small")
    with pytest.raises(UserError, match=r"^unknown recipe 'digit'"):
        recipes.description("digit")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"epochs = = 1", r"not valid TOML \(.*line 1"),
        (b"epochs = 3\nepsilon = 8/255\n", r"not valid TOML \(8/255: TOML has no fractions"),
        (b"\xff\xfe", r"not valid TOML \(.*utf-8"),
        (b"epoch = 1", r": unknown key 'epoch'; the nearest known is 'epochs'$"),
        (b"[training]\nepochs = 1", r": unknown key 'training'"),
        (b"epochs = 1", r": missing keys: dataset, model"),
    ],
)
def test_a_bad_recipe_file_is_named_with_the_reason_in_one_line(tmp_path, content, message):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        recipes.load(path)
    assert str(error.value).startswith(f"recipe {path}: ")
    assert "\n" not in str(error.value)


def test_a_recipe_file_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "none.toml"
    with pytest.raises(UserError, match=r"cannot be read \(No such file or directory\)$"):
        recipes.load(path)
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(UserError, match=r"folder.toml: cannot be read \(Is a directory\)$"):
        recipes.load(tmp_path / "folder.toml")


@pytest.mark.parametrize("epochs", [1, 3, 7, 70, 250])
def test_every_recipe_can_be_rescaled_and_again_to_the_same_length(epochs):
    for recipe in RECIPES:
        config = with_epochs(recipe, epochs)
        assert config.epochs == epochs
        assert with_epochs(config, epochs) == config


@pytest.mark.parametrize("epochs", [3, 50, 99])
def test_a_run_that_ends_before_epsilon_is_reached_is_refused(epochs):
    with pytest.raises(
        UserError, match=r"^epochs: expected at least the 100 of warm-up and main phases,"
    ):
        override(recipes.load("mnist-dm-small"), [f"epochs={epochs}"])
