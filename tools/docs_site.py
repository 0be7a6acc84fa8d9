# SPDX-License-Identifier: Apache-2.0
"""Hooks of mkdocs: what the site of docs/ needs beyond docs/.

Links in docs/ are those of the repository, so that they work in its file view too. On the site a
file or folder outside docs/ is a page of its own, under source/; one that does not exist stays a
broken link, which `mkdocs build --strict` refuses. Formulas become MathML, so that no script draws
them.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()([^()\s#]+)(?=(?:#[^()\s]*)?\))")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
LANGUAGES = {".cuh": "cpp", ".cu": "cpp", ".h": "cpp", ".toml": "toml", ".txt": "text"}


def to_page(path: str) -> str:
    """Where the site has a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def to_repository(page: str) -> str:
    """The file of the repository that a page is made of."""
    if not page.startswith("source/"):
        return f"docs/{page}"
    path = page.removeprefix("source/")
    return path if (ROOT / path).is_file() else path.removesuffix(".md")


def is_markdown(path: str) -> bool:
    """Whether the page of a file or folder has links of the repository."""
    return path.endswith(".md") or (ROOT / path).is_dir()


def targets(path: str, text: str) -> dict[str, str]:
    """The links of a Markdown file that lead out of its folder tree, and what they point to."""
    found = {}
    for link in set(LINK.findall(text)):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
        if ":" not in link and (ROOT / target).exists():
            found[link] = target
    return found


def listing(path: str) -> str:
    """A page that shows a source file, or the names in a folder."""
    if (ROOT / path).is_dir():
        names = sorted(x.name for x in (ROOT / path).iterdir() if x.name[0] not in "._")
        links = (f"* [{name}]({posixpath.basename(path)}/{name})" for name in names)
        return f"# {path}\n\n" + "\n".join(links) + "\n"
    suffix = Path(path).suffix
    language = LANGUAGES.get(suffix, suffix.removeprefix("."))
    return f"# {path}\n\n``````{language}\n{(ROOT / path).read_text()}\n``````\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files outside docs/ that pages link to, and those that these link to."""
    queue = [(f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages()]
    while queue:
        for target in targets(*queue.pop()).values():
            page = to_page(target)
            if target.startswith("docs/") or page in files.src_uris:
                continue
            text = (ROOT / target).read_text() if target.endswith(".md") else listing(target)
            if is_markdown(target):
                queue.append((target, text))
            files.append(
                File.generated(config, page, content=text, inclusion=InclusionLevel.NOT_IN_NAV)
            )
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of the repository become links of the site."""
    path = to_repository(page.file.src_uri)
    if not is_markdown(path):
        return markdown
    places = {
        link: posixpath.relpath(to_page(target), posixpath.dirname(page.file.src_uri))
        for link, target in targets(path, markdown).items()
    }
    return LINK.sub(lambda match: places.get(match[0], match[0]), markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas become MathML."""

    def mathml(match: re.Match[str]) -> str:
        display = "block" if match[2] == "[" else "inline"
        return convert(html.unescape(match[3]), display=display)

    return FORMULA.sub(mathml, content)
