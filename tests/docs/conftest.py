import matplotlib
import pytest


@pytest.fixture(autouse=True)
def settings_of_pictures_end_with_a_test():
    """Examples are scripts and set them for good; other tests draw, too."""
    with matplotlib.rc_context():
        yield
