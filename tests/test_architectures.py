"""docs/architectures.md says what is found on a tiny model of each family; each path that was chosen equals ordinary rows."""

import pytest
from architectures_table import MODELS, PAGE, PAGES, line, lines_of, rendered
from models import TINY

LINES = lines_of(PAGE.read_text())


@pytest.mark.parametrize("index", range(len(MODELS)), ids=[" ".join(one[:2]).replace(" ", "-") for one in MODELS])
def test_table(index):
    if MODELS[index][0] not in TINY:
        pytest.skip("newer than this transformers")
    assert LINES[index : index + 1] == [line(*MODELS[index])]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_pages_are_rendered_from_the_table(page):
    assert len(LINES) == len(MODELS)
    assert page.read_text() == rendered(page.read_text(), LINES)
