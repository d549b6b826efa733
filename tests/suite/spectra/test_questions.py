"""Rows that are odd: on a device, where nobody waits to hear of it, they end where they end on the CPU."""

import numpy as np
import pytest
import torch

from deadbench.suite.reads.rows import check_rows, token_rows
from deadbench.suite.spectra import solvers
from deadbench.suite.spectra.covariance import CovarianceFactor
from deadbench.suite.spectra.questions import Questions
from deadbench.suite.spectra.solvers import Checked, remarks
from tests.fake_gpu import GPU, fake_gpu, most
from tests.suite.spectra.test_solvers import SinglePrecision, rows

D, BATCH = 40, 96


@pytest.fixture
def gpu(monkeypatch):
    with fake_gpu(monkeypatch) as device:
        yield device


def spectrum(rows_ND, device):
    """Of rows that come in batches."""
    factor, questions = CovarianceFactor(D, device), Questions(device)
    for batch in rows_ND.split(BATCH):
        factor.update(batch.to(device), questions=questions)
        questions.settle()
    return factor


def test_answers_come_in_the_order_asked_and_once_a_batch(gpu):
    questions, told = Questions(GPU), []
    with gpu.counting() as counted:
        questions.ask(torch.ones(2).to(GPU), told.append)
        questions.after(lambda: told.append("between"))
        questions.ask(torch.zeros(1, dtype=torch.int64).to(GPU), told.append)
        questions.after(lambda: questions.after(lambda: told.append("asked meanwhile")))
        assert told == []
        questions.settle()
    assert told == [[1.0, 1.0], "between", [0.0], "asked meanwhile"]
    assert counted.numbers()[:2] == (1, 1)


def test_on_the_cpu_an_answer_is_there_when_it_is_asked_for():
    told = []
    Questions().ask(torch.ones(2), told.append)
    Questions().after(lambda: told.append("after"))
    assert told == [[1.0, 1.0], "after"]


@pytest.mark.parametrize("kind", ["plain", "dead", "many dead"])
@pytest.mark.parametrize("odd", [False, True], ids=["all alike", "a row that is too long to be squared"])
def test_by_every_route_the_spectrum_is_the_cpus(kind, odd, gpu):
    rows_ND = rows(kind)
    if odd:
        rows_ND[300] *= 1e4
    here, there = spectrum(rows_ND, "cpu"), spectrum(rows_ND, GPU)
    method = {"plain": "gram", "dead": "lifted-gram", "many dead": "whitened-gram"}[kind]
    assert here.method == there.method == ("whitened-gram" if odd else method)
    assert here.num_rows == there.num_rows == len(rows_ND)
    expected, found = here.finish(), there.finish()
    certified = expected.eigenvalues_D > expected.floor
    np.testing.assert_allclose(found.eigenvalues_D[certified], expected.eigenvalues_D[certified], rtol=1e-7)
    assert remarks() == []


@pytest.mark.parametrize("kind", ["plain", "dead", "many dead"])
def test_what_lies_on_a_device_is_decomposed_there(kind, gpu, monkeypatch):
    asked = set()

    class Recording(solvers.Lapack):
        def __getattribute__(self, name):
            method = super().__getattribute__(name)
            if name.startswith("_"):
                return method
            return lambda matrix, *more, **options: asked.add((name, matrix.device)) or method(matrix, *more, **options)

    monkeypatch.setitem(solvers.WAYS, "cuda", Checked("cuda", Recording()))
    monkeypatch.setitem(solvers.WAYS, "cpu", Recording())
    spectrum(rows(kind), GPU).finish()
    assert {"eigh", "cholesky"} <= {name for name, _ in asked}
    assert {place for _, place in asked} == {GPU}, asked


def test_values_that_are_not_finite_are_told_when_the_batch_is_through(gpu):
    rows_ND, questions = rows("plain"), Questions(GPU)
    factor = spectrum(rows_ND, GPU)
    before = factor.finish().eigenvalues_D
    rows_ND[:BATCH][7, 3] = torch.nan
    factor.update(rows_ND[:BATCH].to(GPU), questions=questions)
    with pytest.raises(ValueError, match="activations are not finite in 1 of 96 rows"):
        questions.settle()
    np.testing.assert_array_equal(factor.finish().eigenvalues_D, before)


def test_a_device_that_whitens_wrongly_is_found_out_and_the_cpu_does_it(gpu):
    solvers.WAYS["cuda"] = Checked("fake", SinglePrecision())
    found = spectrum(rows("many dead"), GPU).finish()
    assert any("a triangular solve on fake is wrong" in line for line in remarks())
    expected = spectrum(rows("many dead"), "cpu").finish()
    certified = expected.eigenvalues_D > expected.floor
    np.testing.assert_allclose(found.eigenvalues_D[certified], expected.eigenvalues_D[certified], rtol=1e-7)


@pytest.mark.parametrize(
    ("value", "told"), [(0.0, "1 of 20 rows after block 1 are all zeros"), (torch.inf, "not finite in 1 of 20 rows")]
)
def test_broken_rows_of_a_stream_are_told_when_the_batch_is_through(value, told, gpu):
    acts_ND, questions = torch.randn(20, D), Questions(GPU)
    acts_ND[3] = value
    check_rows(acts_ND.to(GPU), "after block 1", questions)
    with pytest.raises(ValueError, match=told):
        questions.settle()


def test_tokens_are_picked_without_asking_the_device_where_they_are(gpu):
    acts_BTD = torch.randn(3, 5, D)
    mask_BT = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) > 0.4  # shorter: padded inside the model
    there = acts_BTD.to(GPU)
    with gpu.counting() as counted:
        taken = [token_rows(there, mask_BT) for _ in range(3)]
    assert counted.numbers() == (0, 0, 1), most(counted.syncs)
    for each in taken:
        np.testing.assert_array_equal(each.cpu(), acts_BTD[:, :4][mask_BT])
