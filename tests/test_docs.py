"""The commands in README and docs are ones that the command line takes."""

import re
import shlex

import pytest
from conftest import ROOT

import main

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [line for page in PAGES
            for line in re.findall(r"python main\.py[^`\n]*", page.read_text())]


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_command_parses(command):
    arguments = shlex.split(command)[2:]
    if "-h" not in arguments:
        main.check(main.parse_args(arguments))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
