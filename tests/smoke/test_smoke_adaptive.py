import pytest
from smoke import pages, run

PAGES = pages("adaptive")


@pytest.mark.parametrize("slug", PAGES)
def test_smoke(slug):
    run(PAGES[slug])
