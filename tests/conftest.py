"""What every test may rely on."""

import pytest
import torch


@pytest.fixture(autouse=True)
def single_precision():
    """Some peers change torch's default precision when they are imported; no test shall depend
    on which were imported before."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float32)
