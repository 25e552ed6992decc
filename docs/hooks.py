"""MkDocs hook: files of the repository that a page links to as ``../path`` become files of the site.

Links to Markdown files outside docs/ become plain text, since the site has no page for them. ``<!-- site:NAME -->``
becomes the table that ``python -m benchmarks.readme --site build/tables`` has written; the site itself needs no torch.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
MARKDOWN_LINK = re.compile(r"\[([^\]]*)\]\(\.\./[\w./-]+\.md(?:#[\w-]*)?\)")
LINK = re.compile(r"\]\(\.\./([\w./-]+)\)")
SITE_TABLE = re.compile(r"<!-- site:(\w+) -->")
TABLES = ROOT / "build" / "tables"


def on_files(files, config):
    """Add the linked files under ``repository/``."""
    pages = [MARKDOWN_LINK.sub("", page.content_string) for page in files.documentation_pages()]
    for path in sorted({path for text in pages for path in LINK.findall(text)}):
        files.append(File.generated(config, f"repository/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, **_):
    """Point the links there, and put in the tables that only the site has."""
    markdown = SITE_TABLE.sub(lambda at: (TABLES / f"{at[1]}.md").read_text(encoding="utf-8"), markdown)
    return LINK.sub(r"](repository/\1)", MARKDOWN_LINK.sub(r"\1", markdown))
