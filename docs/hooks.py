"""What MkDocs needs to know of the repository: where the package lies, its commands, and which pages lie outside ``docs``.

The site is the repository with ``docs`` as its root: ``README.md`` is the front page, ``benchmarks/README.md`` a page of its
own, and links between them are written as they work in the repository.
"""

import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
#: Where ``mkdocs.yml`` tells mkdocstrings to look for the package.
DOCUMENTED = ROOT / "build" / "documented" / "backdoor_gym"
#: Pages, and what they show or lead to, outside ``docs``.
OUTSIDE = (
    "README.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
    "benchmarks/results/**/*.png",
    "tutorials/README.md",
)
COMMANDS = re.compile(r"<!-- commands.*?-->")
LINK = re.compile(r"(\]\()([^)\s:#]+)((?:#[^)\s]*)?\))")


@event_priority(100)  # before mkdocstrings, which looks for the folder only once
def on_config(config: Any) -> None:
    """Put the sources together under their import names: ``agents`` and ``baselines`` are mapped when they are installed."""
    shutil.rmtree(DOCUMENTED, ignore_errors=True)
    for source, name in (("backdoor_gym", ""), ("agents", "agents"), ("baselines", "baselines")):
        models = shutil.ignore_patterns("*.safetensors", "__pycache__")
        shutil.copytree(ROOT / source, DOCUMENTED / name, ignore=models, dirs_exist_ok=True)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside ``docs``."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config["site_dir"], config["use_directory_urls"]))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the links of the repository into those of the site."""
    site = page.file.src_uri
    folder = posixpath.dirname(site if (ROOT / site).is_file() else f"docs/{site}")

    def in_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[2]))
        target = re.sub(r"^tutorials/(.*)\.py$", r"tutorials/\1.md", target.removeprefix("docs/"))
        return link[1] + posixpath.relpath(target, posixpath.dirname(site) or ".") + link[3]

    return LINK.sub(in_site, COMMANDS.sub(lambda _: commands(), markdown))


def commands() -> str:
    """What ``--help`` says of each command, as Typer writes it in Markdown."""
    typer = [sys.executable, "-m", "typer", "backdoor_gym.cli", "utils", "docs", "--name", "backdoor-gym"]
    text = subprocess.run(typer, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    text = re.sub(r"^Exit codes:.*\n", "", text, flags=re.MULTILINE)  # they stand at the top of the page
    return text[text.index("## ") :].replace("\n## ", "\n### ").replace("## ", "### ", 1)
