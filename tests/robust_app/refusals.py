"""What the command line says of what its user can mend."""


def assert_refused(outcome, *words):
    """Status 2 and one line on standard error that holds the words."""
    status, _, err = outcome
    assert status == 2, err
    assert err.count("\n") == 1, err
    for word in words:
        assert str(word) in err
