import pytest
from smoke import pages, run

PAGES = pages("privacy")


@pytest.mark.parametrize("slug", PAGES)
def test_smoke(slug):
    run(PAGES[slug])
