"""``robust-app evaluate`` of a run."""

import json
import sys

import pytest
import torch

from robust_app import checkpoint, cli
from robust_app.evaluation import Contradiction
from robust_app.run_directory import RunDirectory
from robust_app.verifiers import VERIFIERS, Verdicts, Verifier
from tests.robust_app.refusals import assert_refused


def test_evaluate_reports_counts_that_add_up(robust_app, finished_run):
    status, out, _ = robust_app("evaluate", finished_run, "--epsilon", "0.05", "--pgd-steps", "3")
    assert status == 0
    assert "ε = 0.05" in out
    results = RunDirectory(finished_run).results()
    assert {result["epsilon"] for result in results} == {0.1, 0.05}
    for result in results:
        assert result["certified"] + result["falsified"] + result["undecided"] == 360
        assert result["standard_error"] <= result["pgd_error"] <= result["verified_error"]
    assert results[-1]["pgd_steps"] == 3


def test_with_an_output_the_run_is_left_as_it_is(robust_app, finished_run, tmp_path):
    (finished_run / ".lock").unlink()
    before = {file.name: file.read_bytes() for file in finished_run.iterdir()}
    evaluation = ("evaluate", finished_run, "--images", "20", "--epsilon", "0.05")
    assert robust_app(*evaluation, "--output", "errors.json")[0] == 0
    assert {file.name: file.read_bytes() for file in finished_run.iterdir()} == before
    found = json.loads((tmp_path / "errors.json").read_text())
    assert (found["network"], found["dataset"]) == (str(finished_run), "digits")
    assert robust_app(*evaluation)[0] == 0
    kept = RunDirectory(finished_run).results()[-len(found["networks"]) :]
    for one, other in zip(found["networks"], kept, strict=True):
        for result in (one, other):
            del result["shares"], result["environment"]["command"]  # seconds, and the output
        assert one == other
    (finished_run / "results.json").unlink()
    for name in (".lock", "results.json", "mine.json"):
        outcome = robust_app(*evaluation, "--output", finished_run / name)
        assert_refused(outcome, "--output: expected a file outside of the run")


def test_a_cascade_shows_who_decided_what(robust_app, finished_run):
    cascade = ("--verifier", "ibp,crown-ibp", "--images", "40", "--time-limit", "5")
    status, out, _ = robust_app("evaluate", finished_run, *cascade, "--epsilon", "0.02")
    assert status == 0
    assert "40 test images" in out
    assert "verified by ibp, crown-ibp" in out
    assert "decided by" in out
    result = RunDirectory(finished_run).results()[-1]
    assert result["certified"] + result["falsified"] + result["undecided"] == 40
    assert (result["verifiers"], result["images"]) == (["ibp", "crown-ibp"], 40)
    assert result["time_limit"] == 5
    shares = result["shares"]
    assert list(shares) == ["pgd", "ibp", "crown-ibp"]
    assert shares["ibp"]["certified"] + shares["crown-ibp"]["certified"] == result["certified"]
    left = 40 - shares["pgd"]["falsified"] - shares["ibp"]["certified"]
    assert shares["crown-ibp"]["examples"] == left


def test_the_complete_verifier_stops_at_its_time_limit(robust_app, finished_run):
    pytest.importorskip("scipy")
    options = ("--verifier", "ibp,exact", "--images", "3", "--time-limit", "1e-6")
    status, out, _ = robust_app("evaluate", finished_run, *options, "--epsilon", "0.01")
    assert status == 0
    assert "verified by ibp, exact" in out
    result = RunDirectory(finished_run).results()[-1]
    assert (result["time_limit"], result["examples"]) == (1e-6, 3)
    assert result["certified"] + result["falsified"] + result["undecided"] == 3


@pytest.mark.parametrize("limit", ["inf", "nan", "0"])
def test_a_time_limit_that_could_not_be_kept_is_refused(robust_app, finished_run, limit):
    before = (finished_run / "results.json").read_bytes()
    outcome = robust_app("evaluate", finished_run, "--images", "3", "--time-limit", limit)
    assert_refused(outcome, "--time-limit: expected a positive, finite number")
    assert (finished_run / "results.json").read_bytes() == before


def test_a_radius_may_be_a_fraction(robust_app, finished_run):
    assert robust_app("evaluate", finished_run, "--images", "3", "--epsilon", "8/255")[0] == 0
    assert RunDirectory(finished_run).results()[-1]["epsilon"] == 8 / 255


@pytest.mark.parametrize("radius", ["a", "1/0", "8/255/2", "8/", ""])
def test_a_radius_that_is_no_number_is_refused(robust_app, finished_run, radius):
    outcome = robust_app("evaluate", finished_run, "--images", "3", "--epsilon", radius)
    assert_refused(outcome, "--epsilon", "expected a number, 0.1 or 8/255", repr(radius))


@pytest.mark.parametrize("radius", ["inf", "nan", "1e9999999", "9/8"])
def test_a_radius_out_of_range_is_refused_at_once(robust_app, finished_run, radius):
    outcome = robust_app("evaluate", finished_run, "--images", "3", "--epsilon", radius)
    assert_refused(outcome, "epsilon: expected a number in [0, 1]")


def test_one_verifier_needs_no_table_of_shares(robust_app, finished_run):
    _, out, _ = robust_app("evaluate", finished_run, "--images", "40")
    assert "decided by" not in out


def test_an_unsound_bound_is_no_fault_of_the_user(robust_app, finished_run, monkeypatch):
    def everything(network, x, labels, epsilon, seconds):
        return Verdicts(torch.ones(len(x), dtype=torch.bool), torch.zeros(len(x), dtype=torch.bool))

    monkeypatch.setitem(VERIFIERS, "ibp", Verifier("unsound", everything))
    monkeypatch.setattr(sys, "argv", ["robust-app", "evaluate", str(finished_run)])
    before = RunDirectory(finished_run).results()
    with pytest.raises(Contradiction, match="not sound"):
        cli.main()
    assert RunDirectory(finished_run).results() == before


def test_the_model_of_another_run_is_refused(robust_app, finished_run):
    model = checkpoint.load(finished_run / "last.pt")
    model["network"]["0.weight"] = model["network"]["0.weight"][:3].clone()
    checkpoint.save(model, finished_run / "last.pt")
    assert_refused(robust_app("evaluate", finished_run), "last.pt", "another network")


def test_evaluate_refuses_what_it_cannot_use(robust_app, finished_run):
    before = RunDirectory(finished_run).results()
    assert_refused(robust_app("evaluate", "nowhere"), "nowhere", "no run here")
    assert_refused(robust_app("evaluate", finished_run, "--verifier", "ipb"), "ipb", "'ibp'")
    assert_refused(robust_app("evaluate", finished_run, "--epsilon", "-1"), "epsilon", "-1")
    outcome = robust_app("evaluate", finished_run, "--verifier", "ibp,crwon")
    assert_refused(outcome, "crwon", "'crown'")
    outcome = robust_app("evaluate", finished_run, "--images", "361")
    assert_refused(outcome, "images", "360", "361")
    assert_refused(robust_app("evaluate", finished_run, "--images", "0"), "--images")
    assert_refused(robust_app("evaluate", finished_run, "--time-limit", "-1"), "time", "-1")
    assert RunDirectory(finished_run).results() == before
