"""What is marked ``gpu`` runs where torch has a CUDA device, and says why it does not elsewhere."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"torch {torch.__version__} sees no GPU"))
