"""The notebooks: each runs without an error, assertions included, and is committed executed."""
import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOKS = ['transformer_sizing.ipynb', 'scaling_laws.ipynb']


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_a_notebook_runs_to_its_end(name):
    notebook = nbformat.read(ROOT / name, as_version=4)
    here = {'metadata': {'path': ROOT}}
    NotebookClient(notebook, timeout=600, kernel_name='python3', resources=here).execute()


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_a_notebook_is_committed_executed_and_small(name):
    cells = nbformat.read(ROOT / name, as_version=4).cells
    cells = [cell for cell in cells if cell.cell_type == 'code']
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    for output in outputs:
        assert output.output_type != 'error'
        assert output.get('name') != 'stderr'
    assert any('image/png' in output.get('data', {}) for output in outputs)
    assert (ROOT / name).stat().st_size < 500_000
