"""Hook of mkdocs: each notebook of docs/ becomes a page of its own, beside the file itself."""

import json
from typing import Any

from mkdocs.structure.files import File, Files


def on_files(files: Files, config: Any) -> Files:
    """Add ``X.md``, rendered from ``X.ipynb``; links to the notebook from other pages keep the file."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        page = notebook.src_uri.removesuffix(".ipynb") + ".md"
        files.append(File.generated(config, page, content=as_markdown(notebook.content_string, name=notebook.name)))
    return files


def as_markdown(text: str, *, name: str) -> str:
    """A notebook's cells: prose as it is, code in fences; after the title the link to the file."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    title, rest = parts[0].partition("\n")[::2]
    return "\n\n".join([title, f"[The notebook itself]({name}.ipynb){{download}}", rest.strip(), *parts[1:]]) + "\n"
