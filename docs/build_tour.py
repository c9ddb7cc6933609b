"""Runs the cells of docs/tour.py and writes them with their outputs to docs/tour.ipynb.

    python docs/build_tour.py [--out FILE]

The file has no times, paths, versions or random ids, so that only a changed output changes it. The cells run
in the Python that runs this script, whatever kernels and profiles are installed."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

DOCS = Path(__file__).parent
TIMEOUT = 600  # seconds for one cell; all of them take about 20
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    notebook = jupytext.read(DOCS / "tour.py")
    run(notebook)
    clean(notebook)
    nbformat.write(notebook, args.out)
    return 0


def run(notebook: nbformat.NotebookNode) -> None:
    """Run the cells in a kernel of this Python. Raises CellExecutionError (of nbclient) if a cell fails."""
    with tempfile.TemporaryDirectory() as scratch:
        # Without directories of kernels there is only ipykernel's own, which is for this Python.
        specs = KernelSpecManager(kernel_dirs=[])
        kernel = AsyncKernelManager(
            kernel_spec_manager=specs, connection_file=f"{scratch}/kernel.json", transport="ipc"
        )
        client = NotebookClient(
            notebook, km=kernel, timeout=TIMEOUT, record_timing=False, coalesce_streams=True
        )
        own = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "IPYTHONDIR": scratch}
        client.execute(cleanup_kc=True, env={**os.environ, **own})


def clean(notebook: nbformat.NotebookNode) -> None:
    """Remove what differs between two runs of the same cells."""
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells, 1):
        cell.id, cell.metadata = f"cell-{number:02}", nbformat.from_dict({})


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    about = "Run the cells of docs/tour.py, and write them with their outputs as a notebook."
    parser = argparse.ArgumentParser(prog="python docs/build_tour.py", description=about)
    notebook, default = DOCS / "tour.ipynb", "the notebook (default: docs/tour.ipynb)"
    parser.add_argument("--out", type=Path, default=notebook, metavar="FILE", help=default)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
