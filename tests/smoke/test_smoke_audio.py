import pytest
from smoke import pages, run

PAGES = pages("audio")


@pytest.mark.parametrize("slug", PAGES)
def test_smoke(slug):
    run(PAGES[slug])
