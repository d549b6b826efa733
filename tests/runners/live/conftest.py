"""What the tests of live models feed them."""

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def tokens():
    """16 sequences of 32 token ids, of a vocabulary of 97."""
    return torch.from_numpy(np.random.default_rng(0).integers(3, 97, (16, 32)))
