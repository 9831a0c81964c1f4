"""Changes one character or symbol of an equation in a script and sees whether a test notices.

    python tests/mutants.py soft_dqn              every mutant of one script's paper block
    python tests/mutants.py soft_dqn 40           from the 40th on
    python tests/mutants.py soft_dqn --list       only list them

A mutant flips a sign, drops a factor tau, gamma, eps or c, a mask or a stop-gradient, changes a
number, an operator or an index. It survives if the checks of test_equations.py that go through the
script, and the script's own tests, pass.
Not collected by pytest: it takes minutes per script.
"""
import io
import linecache
import os
import re
import signal
import sys
import tokenize
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = {"a2c_naive": "test_a2c", "a2c_proper": "test_a2c", "soft_dqn": "test_soft_dqn",
         "pgql_equiv": "test_pgql", "natural_pg_damped": "test_natural"}
# What is not about the equations, and slow: real games, processes, files.
SKIP = ("real", "game", "resum", "memory", "replay", "train", "killed", "signal", "finite",
        "passes", "target_kl", "measuring", "time_limits", "command", "flags", "evaluat", "refill")
SWAPS = {"+": "-", "-": "+", "*": "/", "/": "*", "**": "*", ">": "<", "<": ">", ">=": "<",
         "0": "1", "1": "2", "0.0": "1.0", "0.5": "1.5", "2": "3", "min": "max", "max": "min",
         "maximum": "minimum", "mean": "sum", "sum": "mean", "no_grad": "enable_grad"}
DROPPED = {"tau": "1.0", "gamma": "1.0", "eps": "1.0", "c": "1.0", "done": "(0 * done)"}

def mutants(source):
    """Yields (line number, line, mutated source) for each change within functions of the paper."""
    begin, end = (source.index(f"# === {x} ===") for x in ("the paper", "flags"))
    first, last = (source[:i].count("\n") + 1 for i in (begin, end))
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    lines, inside, header = source.splitlines(keepends=True), False, False
    for before, token in zip(tokens, tokens[1:]):
        (row, start), (_, stop) = token.start, token.end
        if not first <= row < last:
            continue
        if token.string in ("def", "class") and start == 0:
            inside, header = token.string == "def", True
        if header:  # the signature is no equation
            header = not (token.string == ":" and lines[row - 1].rstrip().endswith(":"))
            continue
        new = SWAPS.get(token.string)
        if token.type == tokenize.NAME and token.string in DROPPED:
            assigned = re.match(r"\s*(=[^=]|,.*=)", lines[row - 1][stop:])
            new = None if assigned or before.string in ("for", ".") else DROPPED[token.string]
        if token.string == "*" and before.string in "(,=":
            new = None  # unpacks
        if token.string == "detach":
            new = "clone"
        if inside and new and token.type in (tokenize.OP, tokenize.NAME, tokenize.NUMBER):
            line = lines[row - 1]
            changed = line[:start] + new + line[stop:]
            yield row, changed.strip(), "".join([*lines[:row - 1], changed, *lines[row:]])

def survives(script, source):
    """Whether the tests pass with the mutated source in place of the script, in a fork."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    code = 1
    signal.alarm(300)  # a mutant that never ends is noticed too
    try:
        import pytest
        module = types.ModuleType(script)
        module.__file__ = str(ROOT / f"{script}.py")
        sys.modules[script] = module
        lines = source.splitlines(keepends=True)  # for tests that compare sources
        linecache.cache[module.__file__] = len(source), None, lines, module.__file__
        exec(compile(source, module.__file__, "exec"), vars(module))
        from test_equations import base
        chosen = " and ".join(f"not {word}" for word in SKIP)
        numbers = [n for n, check in base.CHECKS.items() if script in str(check.computed_by)]
        checks = [f"{ROOT}/tests/test_equations.py::test_equation[{n}]" for n in numbers]
        code = pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", chosen, *checks,
                            str(ROOT / "tests" / f"{TESTS[script]}.py")])
    finally:
        os._exit(int(code))

def main(script, start="1"):
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.environ |= dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    import torch
    torch.set_num_threads(1)
    source = (ROOT / f"{script}.py").read_text()
    found = list(mutants(source))
    if start == "--list":
        for row, line, _ in found:
            print(f"{script}.py:{row}: {line}")
        return
    if not survives(script, source):
        sys.exit("the tests fail without any change")
    alive = 0
    for i, (row, line, mutated) in list(enumerate(found, 1))[int(start) - 1:]:
        if survives(script, mutated):
            alive += 1
            print(f"{i}: {script}.py:{row}: {line}", flush=True)
        print(f"{i} of {len(found)}, {alive} survived", end="\r", file=sys.stderr, flush=True)
    print(f"mutants {start} to {len(found)} of {script}.py: {alive} survived")

if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if sys.argv[1:] else __doc__)
