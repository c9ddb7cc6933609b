"""The tour: docs/tour.ipynb has the cells of docs/tour.py and the outputs of a run of today."""

import json
import re
import runpy
import sys

import jupytext
import nbformat
import pytest
from conftest import ROOT
from nbclient.exceptions import CellExecutionError
from PIL import Image

from paligemma import demo, load_hf_model

SOURCE, NOTEBOOK = ROOT / "docs/tour.py", ROOT / "docs/tour.ipynb"
BUILD = runpy.run_path(str(ROOT / "docs/build_tour.py"))


@pytest.fixture(scope="module")
def today(tmp_path_factory) -> nbformat.NotebookNode:
    """The notebook of a run of the cells."""
    out = tmp_path_factory.mktemp("tour") / "tour.ipynb"
    assert BUILD["main"](["--out", str(out)]) == 0
    return nbformat.read(out, 4)


@pytest.fixture(scope="module")
def committed() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, 4)


def cells(notebook) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def without_pictures(notebook) -> dict:
    """All that is in the file, except for the bytes of the plots."""
    notebook = json.loads(nbformat.writes(notebook))
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output["data"]["image/png"] = ""
    return notebook


def printed(notebook) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def test_the_notebook_has_the_cells_of_its_source(committed):
    nbformat.validate(committed)
    source = jupytext.read(SOURCE)
    assert len(source.cells) > 40
    assert cells(committed) == cells(source)


def test_a_run_gives_the_outputs_of_the_notebook(today, committed):
    assert without_pictures(today) == without_pictures(committed)


def test_the_outputs(today):
    outputs = [output for cell in today.cells for output in cell.get("outputs", [])]
    plots = [output for output in outputs if output.output_type == "display_data"]
    assert len(plots) == 9
    assert all("image/png" in plot.data for plot in plots)
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    assert {output.output_type for output in outputs} == {"stream", "display_data"}


def test_the_answers_are_those_of_generate(today):
    answers = json.loads((demo.SAMPLES / "answers.json").read_text())["shapes.png"]
    model, processor = load_hf_model("demo", device="cpu", dtype="float32")
    image = Image.open(demo.SAMPLES / "shapes.png")
    ids = model.generate(**processor("detect red circle", image))
    (found,) = processor.parse(ids[0], image.size).objects
    text = printed(today)
    assert (
        text.count(f"\n{answers['detect red circle']}\n") == 2
    )  # of the reference, and of the PyTorch model
    assert f"\n{answers['caption en']}\n" in text
    assert f"\n{found.label} in the box {found.box} of pixels" in text
    assert "results of the PyTorch model that exceed the rule: 0\n" in text
    assert "the first result that differs in bfloat16: pixel_values\n" in text


def test_the_file_is_small_and_names_no_machine():
    text = NOTEBOOK.read_text()
    assert len(text) < 600_000
    metadata = [cell["metadata"] for cell in json.loads(text)["cells"]]
    assert metadata == [{}] * len(metadata)
    assert json.loads(text)["metadata"] == BUILD["METADATA"]
    assert not re.search(r"/(home|root|Users|tmp|usr|work)/|site-packages|\b20\d\d-\d\d-\d\d\b", text)


def test_the_targets_of_links_exist():
    links = re.findall(r"\]\(([^)#]+)\)", SOURCE.read_text())
    assert len(links) > 5
    assert [link for link in links if not (SOURCE.parent / link).exists()] == []


def test_cells_run_in_this_python_and_a_fault_is_an_error(tmp_path, monkeypatch):
    spec = tmp_path / "kernels/python3/kernel.json"  # of another Python
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": ["false"], "display_name": "another", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    code = "import sys\nprint(sys.executable)", "raise ValueError('planted')", "print('not reached')"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in code])
    with pytest.raises(CellExecutionError, match="planted"):
        BUILD["run"](notebook)
    assert printed(notebook) == f"{sys.executable}\n"
