"""docs/commands.md is what the program says of itself."""

from medicalgpt_cli.commands.reference import page
from tests.cli import ROOT


def test_the_reference_page_is_up_to_date() -> None:
    written = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert written == page(), "run: python -m medicalgpt_cli.commands.reference > docs/commands.md"
