"""Errors reported, cascades, and the check that bounds and attacks do not contradict each other."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from robust_app.attacks import falsified, uniform_start
from robust_app.error_counts import Errors, Share
from robust_app.evaluation import Contradiction, evaluate, standard_and_certified
from robust_app.loading import load_network
from robust_app.run_directory import RunDirectory
from robust_app.verifiers import VERIFIERS, Verdicts, Verifier


def two_pixel_network() -> nn.Module:
    """Class 0 where the first pixel is the brighter one, by their difference."""
    return nn.Flatten()


IMAGES = torch.tensor([[0.9, 0.1], [0.6, 0.5], [0.5, 0.45], [0.2, 0.8]]).view(4, 1, 1, 2)
LABELS = torch.zeros(4, dtype=torch.int64)
ATTACK = {"pgd_steps": 5, "pgd_restarts": 1, "seed": 0}


def counts(errors: Errors) -> tuple[int, ...]:
    """All but the shares."""
    names = ("examples", "misclassified", "attacked", "falsified", "certified")
    return tuple(getattr(errors, name) for name in names)


@pytest.fixture
def verifier(monkeypatch):
    """Put a verifier of one's own in the table."""

    def add(name: str, decide) -> None:
        monkeypatch.setitem(VERIFIERS, name, Verifier("for a test", decide))

    return add


def always(certified: bool, wrong: bool):
    """A verifier that says the same of every image, and the sizes of what it was asked."""
    asked = []

    def decide(network, x, labels, epsilon, seconds):
        asked.append(len(x))
        return Verdicts(torch.full((len(x),), certified), torch.full((len(x),), wrong))

    return decide, asked


# --- One verifier


def test_errors_by_hand():
    # Radius 0.04 closes gaps below 0.08: the third image falls, the fourth is wrong as it is.
    errors = evaluate(two_pixel_network(), IMAGES, LABELS, 0.04, **ATTACK)

    assert counts(errors) == (4, 1, 2, 2, 2)
    assert errors.standard_error == 25.0
    assert (errors.pgd_error, errors.verified_error) == (50.0, 50.0)
    assert errors.undecided == 0
    assert list(errors.shares) == ["pgd", "ibp"]
    of_attack, of_bounds = errors.shares.values()
    assert (of_attack.examples, of_attack.certified, of_attack.falsified) == (4, 0, 2)
    assert (of_bounds.examples, of_bounds.certified, of_bounds.falsified) == (4, 2, 0)
    assert min(of_attack.seconds, of_bounds.seconds) > 0


def test_what_is_neither_broken_nor_proved_is_undecided(verifier):
    verifier("proves nothing", always(False, False)[0])

    errors = evaluate(
        two_pixel_network(), IMAGES, LABELS, 0.04, verifiers=["proves nothing"], **ATTACK
    )

    assert (errors.certified, errors.falsified, errors.undecided) == (0, 2, 2)
    assert errors.verified_error == 100.0
    assert errors.as_dict()["undecided"] == 2


def test_an_unsound_verifier_is_caught(verifier):
    verifier("proves everything", always(True, False)[0])

    with pytest.raises(Contradiction, match="2 images certified by proves everything have counter"):
        evaluate(
            two_pixel_network(), IMAGES, LABELS, 0.04, verifiers=["proves everything"], **ATTACK
        )


def test_bytes_count_as_pixels():
    images = (IMAGES * 255).round().to(torch.uint8)
    errors = evaluate(two_pixel_network(), images, LABELS, 0.04, **ATTACK)
    assert counts(errors) == (4, 1, 2, 2, 2)


def test_every_batch_is_counted_and_told():
    images, labels = IMAGES.repeat(600, 1, 1, 1), LABELS.repeat(600)
    told = []

    errors = evaluate(two_pixel_network(), images, labels, 0.04, on_batch=told.append, **ATTACK)

    assert told == [1000, 1000, 400]
    assert counts(errors) == (2400, 600, 1200, 1200, 1200)
    assert errors.shares["ibp"].examples == 2400
    assert standard_and_certified(two_pixel_network(), images, labels, 0.04).tolist() == [600, 1200]


@given(st.integers(1, 10_000), st.data())
def test_errors_are_ordered_whatever_the_rounding(examples, data):
    falsified = data.draw(st.integers(0, examples))
    attacked = data.draw(st.integers(0, falsified))
    misclassified = data.draw(st.integers(0, attacked))
    certified = data.draw(st.integers(0, examples - falsified))
    errors = Errors(examples, misclassified, attacked, falsified, certified, {})
    assert errors.standard_error <= errors.pgd_error <= errors.verified_error
    assert errors.certified + errors.falsified + errors.undecided == examples


def test_as_dict_is_for_json():
    errors = Errors(4, 1, 2, 3, 1, {"pgd": Share(4, 0, 2, 0.5)})
    assert errors.as_dict() == {
        "examples": 4,
        "misclassified": 1,
        "attacked": 2,
        "falsified": 3,
        "certified": 1,
        "undecided": 0,
        "standard_error": 25.0,
        "pgd_error": 50.0,
        "verified_error": 75.0,
        "shares": {"pgd": {"examples": 4, "certified": 0, "falsified": 2, "seconds": 0.5}},
    }


def trained_on_digits(digits_run, digits) -> tuple[nn.Module, Tensor, Tensor]:
    network, _ = load_network(RunDirectory(digits_run), digits, "best")
    return network, digits.x_test[:100], digits.y_test[:100]


@pytest.mark.parametrize("size", [7, 64])
def test_the_same_seed_finds_the_same_in_batches_of_any_size(digits_run, digits, size, monkeypatch):
    """Where PGD breaks some only from some starts: they may not depend on the batches."""
    arguments = (*trained_on_digits(digits_run, digits), 0.15)
    attack = {"pgd_steps": 1, "pgd_restarts": 2}

    def found(seed: int) -> Errors:
        return evaluate(*arguments, **attack, seed=seed)

    at_once = found(0)
    monkeypatch.setattr("robust_app.evaluation.CHUNK", size)
    assert counts(found(0)) == counts(at_once)
    assert len({counts(found(seed)) for seed in range(4)}) > 1


# --- Cascades


def test_a_later_verifier_is_asked_only_about_what_is_left(verifier):
    nothing, asked_first = always(False, False)
    proves, asked_last = always(True, False)
    verifier("nothing", nothing)
    verifier("proves", proves)

    errors = evaluate(
        two_pixel_network(), IMAGES, LABELS, 0.04, verifiers=["nothing", "ibp", "proves"], **ATTACK
    )

    # The first is asked about all, ibp about the two that the attack left; it proves both.
    assert (asked_first, asked_last) == ([4], [])
    shares = [(share.examples, share.certified) for share in errors.shares.values()]
    assert shares == [(4, 0), (4, 0), (2, 2), (0, 0)]


def test_what_a_verifier_falsifies_is_not_asked_again(verifier):
    breaks, _ = always(False, True)
    after, asked = always(True, False)
    verifier("breaks", breaks)
    verifier("after", after)

    errors = evaluate(
        two_pixel_network(), IMAGES, LABELS, 0.04, verifiers=["breaks", "after"], **ATTACK
    )

    assert asked == []
    # All are falsified, two of them by the verifier; PGD's error is of the attack alone.
    assert counts(errors) == (4, 1, 2, 4, 0)
    assert (errors.pgd_error, errors.verified_error) == (50.0, 100.0)


def test_a_counterexample_to_what_is_certified_is_a_contradiction(verifier):
    both, _ = always(True, True)
    verifier("both", both)
    with pytest.raises(Contradiction, match="certified by both"):
        evaluate(two_pixel_network(), IMAGES[:1], LABELS[:1], 0.04, verifiers=["both"], **ATTACK)


def test_the_time_limit_reaches_the_verifiers(verifier):
    seen = []

    def decide(network, x, labels, epsilon, seconds):
        seen.append(seconds)
        return Verdicts(
            torch.zeros(len(x), dtype=torch.bool), torch.zeros(len(x), dtype=torch.bool)
        )

    verifier("patient", decide)
    arguments = (two_pixel_network(), IMAGES, LABELS, 0.04)
    evaluate(*arguments, verifiers=["patient"], time_limit=2.5, **ATTACK)
    evaluate(*arguments, verifiers=["patient"], **ATTACK)
    assert seen == [2.5, 60.0]


def blob_problem() -> tuple[nn.Sequential, Tensor, Tensor]:
    """Three classes that a briefly trained network tells apart, with images at their borders."""
    torch.manual_seed(0)
    x = torch.rand(120, 1, 2, 3)
    labels = (3 * x.flatten(1)[:, :3].sum(1) / 3.001).long().clamp(max=2)
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16))
    network.extend([nn.ReLU(), nn.Linear(16, 3)])
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), labels).backward()
        optimizer.step()
    return network, x[:60], labels[:60]


@pytest.fixture(scope="module")
def cascade() -> Errors:
    pytest.importorskip("scipy")
    names = ["ibp", "crown-ibp", "alpha-crown-ibp", "crown", "alpha-crown", "exact"]
    return evaluate(*blob_problem(), 0.02, verifiers=names, **ATTACK)


def test_real_shares_add_up(cascade):
    attack, *verifiers = cascade.shares.values()
    assert attack.examples == cascade.examples == verifiers[0].examples == 60
    assert attack.falsified == cascade.attacked
    assert sum(share.certified for share in verifiers) == cascade.certified
    left = cascade.examples - cascade.attacked
    for before, share in itertools.pairwise(verifiers):
        left -= before.certified + before.falsified
        assert share.examples == left
    assert verifiers[0].certified > 0  # intervals prove some,
    assert sum(share.certified for share in verifiers[1:-1]) > 0  # linear bounds more,
    assert cascade.undecided == 0  # and the complete verifier leaves nothing open
    assert cascade.falsified == 60 - cascade.certified


def test_a_cascade_decides_what_its_last_verifier_decides(cascade):
    alone = evaluate(*blob_problem(), 0.02, verifiers=["exact"], **ATTACK)
    assert counts(alone)[3:] == counts(cascade)[3:]
    assert evaluate(*blob_problem(), 0.02, **ATTACK).certified == cascade.shares["ibp"].certified


def test_what_only_the_complete_verifier_breaks_is_counted_apart():
    """A network that errs on (0.52, 0.54), past which a step of 2.5 ε carries the attack."""
    pytest.importorskip("scipy")
    inner, outer = nn.Linear(1, 2), nn.Linear(2, 2)
    with torch.no_grad():
        inner.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        inner.bias.copy_(torch.tensor([-0.53, 0.53]))
        outer.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
        outer.bias.copy_(torch.tensor([-0.01, 0.0]))
    network = nn.Sequential(nn.Flatten(), inner, nn.ReLU(), outer)
    x, labels = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0])
    seed = next(
        seed
        for seed in range(50)
        if uniform_start(x, torch.Generator().manual_seed(seed)).item() < 0
    )
    attack = {"pgd_steps": 1, "pgd_restarts": 1, "seed": seed}
    generator = torch.Generator().manual_seed(seed)
    missed = falsified(network, x, labels, 0.1, steps=1, restarts=1, generator=generator)
    assert not missed.item()

    errors = evaluate(network, x, labels, 0.1, verifiers=["ibp", "exact"], **attack)

    assert counts(errors) == (1, 0, 0, 1, 0)
    share = errors.shares["exact"]
    assert (share.examples, share.certified, share.falsified) == (1, 0, 1)
    assert (errors.pgd_error, errors.verified_error) == (0.0, 100.0)
