"""Lets tests import the helpers beside this file; and threads enough for small tensors."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
