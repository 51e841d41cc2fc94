"""What has to be settled before a module of the package is imported."""

import importlib.util
import os

import pytest
import torch
from hypothesis import settings

# How long an example takes depends on what else the machine does.
settings.register_profile("here", deadline=None)
settings.load_profile("here")

# The Triton kernels are interpreted where no GPU is at hand.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Triton has no wheels for some platforms: its module is then left out of the doctests.
collect_ignore = (
    [] if importlib.util.find_spec("triton") else ["sae_afa_plugin/rules/triton_kernel.py"]
)


@pytest.fixture(autouse=True)
def _the_same_numbers_in_every_example(request: pytest.FixtureRequest) -> None:
    """An example of a docstring draws what it always draws, whatever ran before it."""
    if isinstance(request.node, pytest.DoctestItem):
        torch.manual_seed(0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Refuse values without an order: each of pytest-xdist's processes would have its own."""
    for mark in metafunc.definition.iter_markers("parametrize"):
        values = mark.args[1] if len(mark.args) > 1 else mark.kwargs["argvalues"]
        if isinstance(values, set | frozenset):
            pytest.fail(f"{metafunc.definition.nodeid}: parametrize over a list, not a set")
