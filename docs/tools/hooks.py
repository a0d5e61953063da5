"""What mkdocs calls while it builds the site."""

from typing import Any

from mkdocs.structure.files import File, Files

from docs.tools import reference


def on_files(files: Files, config: Any) -> Files:
    """Adds what is generated from the code."""
    for path, text in {**reference.pages(), **reference.files()}.items():
        files.append(File.generated(config, path, content=text))
    return files
