"""benchmarks/page.py: each benchmark has its place on the page, and a table goes nowhere else."""

import pytest
from farms import ROOT

from benchmarks import page

TEXT = "# A\n\n<!-- one -->\n\nold\n\n<!-- end of one -->\n\nprose\n\n<!-- two -->\n\n| kept |\n\n<!-- end of two -->\n"


def test_a_table_takes_the_place_of_the_last_one_and_of_nothing_else():
    new = page.replaced(TEXT, "one", "| a \\1 b |")
    assert new == TEXT.replace("old", "| a \\1 b |")
    assert page.replaced(new, "one", "old") == TEXT


def test_a_page_without_the_place_is_told():
    with pytest.raises(page.NoPlace, match="three"):
        page.replaced(TEXT, "three", "| a |")
    with pytest.raises(page.NoPlace, match="one"):
        page.replaced(TEXT + TEXT, "one", "| a |")


@pytest.mark.parametrize("name", page.COMMANDS)
def test_every_benchmark_has_a_place_and_a_table_there(name):
    text = page.PAGE.read_text()
    assert page.replaced(text, name, "") != text
    between = text.partition("<!-- %s -->" % name)[2].partition("<!-- end of %s -->" % name)[0]
    assert page.COMMANDS[name] in between
    assert "\n| " in between, "no table: python -m benchmarks.page --only %s" % name


@pytest.mark.parametrize("name", page.COMMANDS)
def test_every_benchmark_knows_its_arguments(name):
    script, *arguments = page.COMMANDS[name].split()
    source = (ROOT / "benchmarks" / (script.replace(".", "/") + ".py")).read_text()
    for argument in arguments:
        if argument.startswith("--"):
            assert '"%s"' % argument in source, "%s does not know %s" % (script, argument)
