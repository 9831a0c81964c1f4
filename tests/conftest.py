import importlib
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the scripts, before torch
os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest runs in two processes: pyproject.toml

import pytest
import torch

A2C = ("a2c_naive", "a2c_proper")
SCRIPTS = (*A2C, "soft_dqn", "pgql_equiv", "natural_pg_damped")


@pytest.fixture(params=A2C)
def a2c(request):
    """Each of the two A2C scripts in turn, as a module."""
    return importlib.import_module(request.param)


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Every script in turn, as a module."""
    return importlib.import_module(request.param)


@pytest.fixture
def shared():
    """One script, for what lies in shared blocks: these are the same, byte for byte, in all."""
    return importlib.import_module("a2c_proper")


@pytest.fixture
def double():
    """Float64 as the default, for checks against exact results."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
