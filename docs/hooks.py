"""What mkdocs does not do of itself here: pages outside docs/, links to source files, mathematics, commands.

The Markdown stays as the forge shows it. mkdocs calls the functions at the end of this file, by their names.
"""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from math_core import LatexToMathML
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parent.parent
OUTSIDE = {  # page of the site: file of the repository
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
    "examples.md": "examples/README.md",
}
LINK = re.compile(r"(?<=\]\()[^()\s]+(?=\))|(?<=\]: )\S+$", re.MULTILINE)
MATHEMATICS = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
ROLE = re.compile(r":(?:func|class|data):(?=<code>)")
COMMANDS, PYTHON = "<!-- commands -->", "<!-- python -->"


def _origin(page: str) -> Path:
    """The file of the repository that a page of the site is made of."""
    return ROOT / OUTSIDE.get(page, f"docs/{page}")


def _page(target: Path) -> str:
    """The page, or the picture, of the site that shows a file or folder of the repository."""
    path = target.relative_to(ROOT).as_posix()
    for page, file in OUTSIDE.items():
        if path == file:
            return page
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.md"


def _target(link: str, origin: Path) -> Path | None:
    """The file or folder of the repository that a link of ``origin`` leads to."""
    target = Path(os.path.normpath(origin.parent / link.partition("#")[0]))
    return target if ROOT in target.parents and target.exists() and not link.startswith("#") else None


def _source(path: Path) -> str:
    """A page that shows a source file, or the names in a folder."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        return f"# {name}/\n\n" + "".join(
            f"- `{each.name}`\n" for each in sorted(path.iterdir()) if each.name[0] not in "._"
        )
    return f"# {name}\n\n````{path.suffix.lstrip('.')}\n{path.read_text(encoding='utf-8')}\n````\n"


def _commands() -> str:
    """Every command with its options, by typer's own generator."""
    command = [sys.executable, "-m", "typer", "anymla.cli", "utils", "docs", "--name", "anymla"]
    text = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return text[text.index("\n## ") :]  # without the list of all commands, which cuts their summaries


def _python() -> str:
    """A directive of mkdocstrings for every public name."""
    import anymla

    functions = sorted(name for name in anymla.__all__ if name[0].islower())
    kinds = {"Functions": functions, "Classes": sorted(set(anymla.__all__) - {*functions})}
    return "\n".join(
        f"## {kind}\n\n" + "".join(f"::: anymla.{name}\n\n" for name in names) for kind, names in kinds.items()
    )


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of OUTSIDE, and one for every source file that a page links to."""
    for page, file in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / file).read_text(encoding="utf-8")))
    for file in list(files.documentation_pages()):
        origin = _origin(file.src_uri)
        targets = {_target(link, origin) for link in LINK.findall(origin.read_text(encoding="utf-8"))} - {None}
        for target in sorted(targets):
            if (page := _page(target)).startswith("source/") and files.get_file_from_path(page) is None:
                files.append(File.generated(config, page, content=_source(target), inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links of the repository into links of the site, and fills in what is generated."""
    here = page.file.src_uri
    if here.startswith("source/"):
        return markdown

    def changed(match: re.Match[str]) -> str:
        target = _target(match[0], _origin(here))
        if target is None:
            return match[0]
        _, mark, anchor = match[0].partition("#")
        return os.path.relpath(_page(target), os.path.dirname(here) or ".") + mark + anchor

    text = LINK.sub(changed, markdown)
    if COMMANDS in text:
        text = text.replace(COMMANDS, _commands())
    return text.replace(PYTHON, _python()) if PYTHON in text else text


def on_page_content(content: str, **_: Any) -> str:
    """Turns formulas into MathML, which browsers show without a script, and drops Sphinx's roles from docstrings."""
    converter = LatexToMathML()

    def mathml(match: re.Match[str]) -> str:
        made = converter.convert_with_local_state(html.unescape(match[2]), displaystyle=match[1] == "div")
        return made.replace("\u0332", "\u203e")  # a low line as an overline is stretched in few fonts

    return ROLE.sub("", MATHEMATICS.sub(mathml, content))
