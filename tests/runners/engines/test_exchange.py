"""What replicas ship of their Gram matrices: the bytes of a state and no more, in pieces, and no bit of it changed."""

import pickle
import queue
import threading

import numpy as np
import pyarrow as pa
import pytest
import torch

from deadbench.runners.engines import exchange as place
from deadbench.runners.engines.exchange import Exchange
from deadbench.suite.ranks import RankError
from deadbench.suite.reads.tap import Tap
from tests.fake_gpu import GPU, fake_gpu
from tests.suite.spectra.test_arrow_state import in_ranks

D, SIZE = 24, 3


@pytest.fixture(scope="module")
def states():
    """Of three ranks; the second has seen nothing of this tap, and the third not enough for its route."""
    taps = []
    for rank, rows in enumerate((8 * D, 0, D)):
        tap = Tap(D, 4 * D)
        generator = torch.Generator().manual_seed(rank)
        tap.update(torch.randn(rows, D, generator=generator) + rank)
        taps.append(tap.to_arrow() if rows else None)
    return taps


def exchanged(states, owner, gather=lambda ranks, mine: ranks.gather(mine)):
    """(what each rank was given, [(from, to, bytes) of each piece])."""
    boxes = {(a, b): queue.Queue() for a in range(SIZE) for b in range(SIZE)}
    shipped, lock = [], threading.Lock()

    def send(piece, rank, to):
        with lock:
            shipped.append((rank, to, piece.numel() * piece.element_size()))
        boxes[rank, to].put(piece)

    def work(ranks):
        mail = Exchange(
            ranks.rank,
            lambda mine: gather(ranks, mine),
            lambda piece, to: send(piece, ranks.rank, to),
            lambda piece, rank: piece.copy_(boxes[rank, ranks.rank].get(timeout=60)),
        )
        return mail.collect(states[ranks.rank], owner)

    return in_ranks(SIZE, work), shipped


@pytest.mark.parametrize("owner", [0, 2])
def test_the_owner_has_every_state_in_the_order_of_the_ranks_and_no_bit_of_it_changed(states, owner, monkeypatch):
    monkeypatch.setattr(place, "_PIECE_BYTES", 1000)
    given, shipped = exchanged(states, owner)
    assert [given[rank] for rank in range(SIZE) if rank != owner] == [[], []]
    assert given[owner] == states
    assert max(size for *_, size in shipped) == 1000
    assert {(rank, to) for rank, to, _ in shipped} == {(rank, owner) for rank in (0, 2) if rank != owner}


def test_what_is_shipped_is_a_state_and_pickling_ships_the_largest_for_every_rank(states):
    """gather_object pickles, pads all to the longest, and ships those of ranks that have nothing as well."""
    _, shipped = exchanged(states, 2)
    moved = sum(size for *_, size in shipped)
    numbers = states[0].nbytes
    assert numbers <= moved <= numbers + 8192  # Arrow's description of the columns
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, states[0].schema) as writer:
        writer.write_batch(states[0])
    pickled = SIZE * len(pickle.dumps(sink.getvalue().to_pybytes()))
    assert moved < pickled / 2.9


def test_merged_in_the_order_of_the_ranks_it_is_the_same_to_the_bit(states):
    given, _ = exchanged(states, 2)
    spectra = []
    for each in (states, given[2]):
        first, last = (Tap.from_arrow(state) for state in each if state is not None)
        first.merge(last)
        spectra.append(first.finish())
    np.testing.assert_array_equal(spectra[0].eigenvalues_D, spectra[1].eigenvalues_D)
    np.testing.assert_array_equal(spectra[0].eigenvectors_DD, spectra[1].eigenvectors_DD)


def test_a_rank_that_fails_is_told_of_before_anything_is_sent(states):
    def failing(ranks, mine):
        return ranks.gather(("no memory", None) if ranks.rank == 1 else mine)

    given, shipped = exchanged(states, 0, gather=failing)
    assert [type(each) for each in given] == [RankError] * SIZE
    assert shipped == []


def test_by_nccl_pieces_go_from_device_to_device(states, monkeypatch):
    boxes = queue.Queue()
    with fake_gpu(monkeypatch) as gpu:
        told = [(None, 0), (None, len(place._packed(states[0])))]
        sender = Exchange(1, lambda mine: told, lambda piece, to: boxes.put(piece), None, GPU)
        owner = Exchange(0, lambda mine: told, None, lambda piece, rank: piece.copy_(boxes.get(timeout=60)), GPU)
        with gpu.counting() as counted:
            assert sender.collect(states[0], 0) == []
            assert boxes.queue[0].device == GPU
            assert owner.collect(None, 0) == [None, states[0]]
    assert counted.numbers() == (1, 1, 1)
