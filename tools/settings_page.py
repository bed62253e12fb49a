"""docs/settings.md, made from megatron_dgpo/config.py: every setting with its type, default and meaning.

python tools/settings_page.py             # write the page
python tools/settings_page.py --check     # exit status 1 if the page is not what config.py says
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_dgpo.config import Config
from megatron_dgpo.settings_table import settings_of

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"

_INTRODUCTION = """# Settings

Made by `python tools/settings_page.py` from [megatron_dgpo/config.py](../megatron_dgpo/config.py); a test fails when it
is not current, so change the docstrings there and run the command again.

A config is a YAML file with these sections, and the command line overrides it by `section.name=value`. Relative paths
in the file are relative to the file. `null` switches an optional setting off, or leaves the choice to the program, as
its line says. Integers are below 2^31, bytes below 2^63. Names that end in `_s` are in seconds, in `_bytes` in bytes,
in `_tokens` in tokens.
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the page is stale")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/settings.md")
    options = parser.parse_args(arguments)
    wanted = page()
    if not options.check:
        options.page.write_text(wanted, encoding="utf-8")
    elif not options.page.is_file() or options.page.read_text(encoding="utf-8") != wanted:
        print(f"{options.page} is not what config.py says: run python tools/settings_page.py", file=sys.stderr)
        return 1
    return 0


def page() -> str:
    """The whole page, as Markdown."""
    return "\n".join([_INTRODUCTION, *map(_section, Config.model_fields)])


def _section(name: str) -> str:
    lines = [f"## {name}\n", "| setting | type | default | meaning |", "|---|---|---|---|"]
    for setting in settings_of(name):
        cells = [cell.replace("|", "\\|") for cell in setting]
        lines.append(f"| `{cells[0]}` | " + " | ".join(cells[1:]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
