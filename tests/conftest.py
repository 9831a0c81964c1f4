import importlib
import os
import signal
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads sleep
os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest runs in two processes: pyproject.toml

import pytest
import torch

from util import Game

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

@pytest.fixture(params=SCRIPTS[1:])
def four(request):
    """All but a2c_naive, whose code is that of a2c_proper but for one line, as a module."""
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

@pytest.fixture
def quick(monkeypatch):
    """Every script plays util.Game."""
    for name in SCRIPTS:
        monkeypatch.setattr(importlib.import_module(name), "Atari", Game)

@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a script's command line in this process; returns exit code, stdout and stderr."""
    numbers = signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)

    def run(script, *flags):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
        capsys.readouterr()
        before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
        try:
            script.main(script.Args, script.train)
        except SystemExit as e:
            return e.code, *capsys.readouterr()
        finally:
            script.STOP.clear()
            for number, handler in zip(numbers, before):
                signal.signal(number, handler)

    return run
