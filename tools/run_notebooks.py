"""Executes the notebooks in examples/ without a network: `python tools/run_notebooks.py [--write] [NAME ...]`.

Each runs whole, in a process and a folder of its own; an error of a cell ends the run with its traceback. With
`--write` the outputs are stored, without times and paths of the machine. `make test-notebooks` calls it.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SECONDS = 600  # of a cell
PICTURE = 60_000  # characters of an output, about as many bytes of a picture
# Not reproducible, or of one machine.
REMOVED = ("execution", "collapsed", "scrolled")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "JAX_PLATFORMS": "cpu",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
}


def run(path: Path) -> nbformat.NotebookNode:
    """The executed notebook; CellExecutionError for a cell that fails."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": folder}}
        )
        client.execute()
    return notebook


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without messages of the machine; ValueError for an output that is too large."""
    for cell in notebook.cells:
        for name in REMOVED:
            cell.metadata.pop(name, None)
        if cell.cell_type != "code":
            continue
        cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
        for output in cell.outputs:
            size = len(str(output))
            if size > PICTURE * 4 / 3:  # base64
                raise ValueError(
                    f"an output of the cell {cell.source[:40]!r} has {size:,} characters: make it smaller"
                )
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="of notebooks in examples/; default: all")
    parser.add_argument("--write", action="store_true", help="store the outputs")
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    names = options.names or sorted(path.stem for path in EXAMPLES.glob("*.ipynb"))
    for name in names:
        begin = time.monotonic()
        path = EXAMPLES / f"{re.sub('[.]ipynb$', '', name)}.ipynb"
        notebook = run(path)
        if options.write:
            nbformat.write(cleaned(notebook), path)
        print(f"{path.name}: {time.monotonic() - begin:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
