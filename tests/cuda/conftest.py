import pytest
import torch


def pytest_collection_modifyitems(items):
    """Tests that take the `cuda` fixture are skipped, by name, where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def cuda():
    return torch.device("cuda")
