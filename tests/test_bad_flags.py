"""Wrong command lines: exit code 2, one sentence with flag, value and what is allowed, no trace."""
import dataclasses
import importlib
import os
import re
import subprocess
import sys

import pytest
import torch

from conftest import SCRIPTS
from test_run import ROOT

# A line and what is printed for it, * being anything. These hold for every script. In the folder
# are: file, a regular one; empty, a folder; own and other, runs of this and of another script.
EVERY = {
    # types
    "--gamma abc": "--gamma abc is not a number between 0 and 1",
    "--gamma 0,9": "--gamma 0,9 is not a number between 0 and 1",
    "--gamma=": "--gamma has no value after it; it takes a number between 0 and 1",
    "--gamma": "--gamma has no value after it; it takes a number between 0 and 1",
    "--env-id": "--env-id has no value after it; it takes a text",
    "--num-envs 2.5": "--num-envs 2.5 is not a whole number between 1 and 1,024",
    "--num_envs two": "--num_envs two is not a whole number between 1 and 1,024",
    "--total-timesteps 1e6":
        "--total-timesteps 1e6 is not a whole number between 1 and 1,000,000,000,000",
    "--seed 1.5": "--seed 1.5 is not a whole number between 0 and 4,294,967,295",
    "--seed 0x10": "--seed 0x10 is not a whole number between 0 and 4,294,967,295",
    "--threads all": "--threads all is not a whole number between 0 and 4,096",
    "--save-minutes=10m": "--save-minutes 10m is not a number between 0 and 1,000,000",
    "--fast 1": "--fast 1: it takes no value; --no- before the name turns it off",
    "--no-fast=0": "--no-fast 0: it takes no value; *",
    "--tensorboard yes": "--tensorboard yes: it takes no value; *",
    # ranges
    "--gamma 1.5": "--gamma 1.5 is not a number between 0 and 1",
    "--gamma -0.1": "--gamma -0.1 is not a number between 0 and 1",
    "--gamma nan": "--gamma nan is not a number between 0 and 1",
    "--tau -1": "--tau -1.0 is not a number between *0* and 1,000,000",
    "--tau nan": "--tau nan is not a number between *0* and 1,000,000",
    "--tau inf": "--tau inf is not a number between *0* and 1,000,000",
    "--learning-rate nan": "--learning-rate nan is not a number between 0 and 1,000,000",
    "--learning-rate -1": "--learning-rate -1.0 is not a number between 0 and 1,000,000",
    "--max-grad-norm 0":
        "--max-grad-norm 0.0 is not a number between 1e-12 and 1,000,000,000,000",
    "--num-envs 0": "--num-envs 0 is not a whole number between 1 and 1,024",
    "--num-envs -3": "--num-envs -3 is not a whole number between 1 and 1,024",
    "--num-envs 1025": "--num-envs 1025 is not a whole number between 1 and 1,024",
    "--total-timesteps 0": "--total-timesteps 0 is not a whole number between 1 and *",
    "--total-timesteps 9999999999999": "--total-timesteps 9999999999999 is not a whole number *",
    "--schedule-timesteps -1": "--schedule-timesteps -1 is not a whole number between 0 and *",
    "--seed -1": "--seed -1 is not a whole number between 0 and 4,294,967,295",
    "--seed 4294967296": "--seed 4294967296 is not a whole number between 0 and 4,294,967,295",
    "--threads -2": "--threads -2 is not a whole number between 0 and 4,096",
    "--sticky 1.1": "--sticky 1.1 is not a number between 0 and 1",
    "--log-every 0": "--log-every 0 is not a whole number between 1 and 1,000,000,000,000",
    "--eval-every -1": "--eval-every -1 is not a whole number between 0 and 1,000,000,000,000",
    "--eval-episodes -1": "--eval-episodes -1 is not a whole number between 0 and 1,000,000",
    "--checkpoint-every -5": "--checkpoint-every -5 is not a whole number between 0 and *",
    "--save-minutes inf": "--save-minutes inf is not a number between 0 and 1,000,000",
    "--max-episode-frames 3": "--max-episode-frames 3 is not a whole number between 4 and *",
    # choices and unknown flags; more of these, for which tyro takes longer, are in UNKNOWN
    "--device tpu": "--device tpu is not auto or cpu or cuda",
    "--device CPU": "--device CPU is not auto or cpu or cuda",
    "--taus 1": "--taus is not a flag of *.py; perhaps you meant --tau",
    "--gamme 0.9": "--gamme is not a flag of *.py; perhaps you meant --gamma",
    # games
    "--env-id ALE/Brakout-v5":
        "--env-id ALE/Brakout-v5 is not a game of the emulator; try ALE/Breakout-v5*",
    "--env-id PongNoFrameskip-v4": "--env-id PongNoFrameskip-v4 *; try ALE/Pong-v5",
    "--env-id pong": "--env-id pong is not a game of the emulator; try ALE/Pong-v5",
    "--env-id ale/pong-v5": "--env-id ale/pong-v5 *; try ALE/Pong-v5",
    "--env-id ALE/PONG-v5": "--env-id ALE/PONG-v5 *; try ALE/Pong-v5",
    "--env-id ALE/Pong-v4": "--env-id ALE/Pong-v4 *; try ALE/Pong-v5",
    "--env-id SpaceInvaders-ram-v0": "*; try ALE/SpaceInvaders-v5",
    "--env-id CartPole-v1": "--env-id CartPole-v1 is not a game of the emulator; try *",
    "--env-id xyzzy": "--env-id xyzzy *; try an id like ALE/Pong-v5",
    "--env-id=": "--env-id  is not a game of the emulator; try an id like ALE/Pong-v5",
    # folders and checkpoints
    "--runs-dir file": "--runs-dir: cannot write to file/*",
    "--runs-dir file/below": "--runs-dir: cannot write to file/below/*",
    "--runs-dir /proc/none": "--runs-dir: cannot write to /proc/none/*",
    "--resume nowhere":
        "--resume nowhere is not a run of this *.py: there is no checkpoint at nowhere",
    "--evaluate nowhere": "--evaluate nowhere is not a run of this *.py: there is no checkpoint *",
    "--resume empty": "--resume empty *: there is no checkpoint at empty/checkpoint.pt",
    "--resume file": "--resume file *: file cannot be read as a checkpoint (*)",
    f"--resume {'x' * 300}": "--resume x* is not a run of this *.py: *",
    "--resume other": "--resume other *.pt was made by other.py*, this is *",
    "--evaluate other": "--evaluate other *.pt was made by other.py*, this is *",
    "--resume future": "--resume future is not a run *: * unexpected keyword argument 'zeta'",
    "--resume own --evaluate own": "--evaluate own goes without --resume own",
    "--evaluate own --eval-episodes 0": "--eval-episodes 0: --evaluate plays at least 1",
    "--resume own --gamma 0.5": "--gamma 0.5: the run to resume has 0.99",
    "--resume own --num-envs 5": "--num-envs 5: the run to resume has *",
    "--resume own --seed 7": "--seed 7: the run to resume has 1",
    "--resume own --schedule-timesteps 9": "--schedule-timesteps 9: the run to resume has *0",
    "--resume own --total-timesteps 300000": "--total-timesteps 300000: it is at 400000",
    "--resume own --gamma 2": "--gamma 2.0 is not a number between 0 and 1",
    "--resume own --taus 1": "--taus is not a flag of *.py; perhaps you meant --tau",
}
UNKNOWN = {
    "--no-sed": "--no-sed is not a flag of *.py; *",
    "--xyzzy": "--xyzzy is not a flag of *.py; --help lists all of them",
    "-x": "-x is not a flag of *.py; --help lists all of them",
    "0.5": "0.5 is not a flag of *.py; --help lists all of them",
    "gamma 0.5": "gamma is not a flag of *.py; perhaps you meant --gamma",
    "--gamma 0.5 0.7": "0.7 is not a flag of *.py; --help lists all of them",
    "--seed 3 --gamme 0.9": "--gamme is not a flag of *.py; perhaps you meant --gamma",
}
ROLLOUTS = {  # of the scripts that learn from rollouts
    "--regularizer foo": "--regularizer foo is not entropy or kl",
    "--num-steps 0": "--num-steps 0 is not a whole number between 1 and 1*,000",
    "--num-envs 1024 --num-steps 1000":
        "--num-envs 1024 with --num-steps 1000 needs 238.42 GiB of *, 8.00 GiB are free",
    "--resume own --regularizer kl": "--regularizer kl: the run to resume has entropy",
}
A2C = {
    "--vf-coef inf": "--vf-coef inf is not a number between 0 and 1,000,000",
    "--vf-coef theory": "--vf-coef theory is not a number between 0 and 1,000,000",
    "--num-steps 1001": "--num-steps 1001 is not a whole number between 1 and 1,000",
}
OWN = {
    "a2c_naive": ROLLOUTS | A2C,
    "a2c_proper": ROLLOUTS | A2C | UNKNOWN,
    "pgql_equiv": ROLLOUTS | {
        "--update sarsa": "--update sarsa is not pg or ql",
        "--parameterization duel": "--parameterization duel is not dueling or q",
        "--compare-every -1": "--compare-every -1 is not a whole number between 0 and *",
        "--vf-coef practice":
            "--vf-coef practice is not a number between 0 and 1,000,000 or theory",
        "--vf-coef -1": "--vf-coef -1.0 is not a number between 0 and 1,000,000 or theory",
        "--vf-coef nan": "--vf-coef nan is not a number between 0 and 1,000,000 or theory",
        "--tau 0 --parameterization q":
            "--tau 0: --parameterization q divides by it; use at least 1e-6",
        "--tau 0 --vf-coef theory": "--tau 0: --vf-coef theory divides by it; use at least 1e-6",
        "--vf-coef theory --tau 1e-7":
            "--tau 1e-07: --vf-coef theory divides by it; use at least 1e-6",
        "--resume own --update pg": "--update pg: the run to resume has ql",
        "--resume own --vf-coef theory": "--vf-coef theory: the run to resume has 0.5",
    },
    "natural_pg_damped": ROLLOUTS | {
        "--tau 0": "--tau 0.0 is not a number between 1e-06 and 1,000,000",
        "--solver newton": "--solver newton is not regression or cg",
        "--value both": "--value both is not separate or head or shared",
        "--eps 1.5": "--eps 1.5 is not a number between 0 and 1",
        "--target-kl -1": "--target-kl -1.0 is not a number between 0 and 10",
        "--damping -0.1": "--damping -0.1 is not a number between 0 and 1,000,000",
        "--cg-iterations 0": "--cg-iterations 0 is not a whole number between 1 and 10,000",
        "--passes 0": "--passes 0 is not a whole number between 1 and 1,000",
        "--value-passes 0": "--value-passes 0 is not a whole number between 1 and 1,000",
        "--value-learning-rate nan": "--value-learning-rate nan is not a number between 0 and *",
        "--minibatch-size 0": "--minibatch-size 0 is not a whole number between 1 and 10,000,000",
        "--n-step 0": "--n-step 0 is not a whole number between 1 and 10,000",
        "--measure-every -1": "--measure-every -1 is not a whole number between 0 and *",
    },
    "soft_dqn": UNKNOWN | {
        "--backup max": "--backup max is not hard or soft-entropy or soft-kl",
        "--loss l1": "--loss l1 is not huber or square",
        "--exploration greedy": "--exploration greedy is not epsilon-greedy or boltzmann",
        "--eval-epsilon nan": "--eval-epsilon nan is not a number between 0 and 1",
        "--eval-epsilon 1.5": "--eval-epsilon 1.5 is not a number between 0 and 1",
        "--n-step 0": "--n-step 0 is not a whole number between 1 and 1,000",
        "--batch-size 0": "--batch-size 0 is not a whole number between 1 and 1,000,000",
        "--train-frequency 0": "--train-frequency 0 is not a whole number between 1 and *",
        "--target-network-frequency 0": "--target-network-frequency 0 is not a whole number *",
        "--tau 0": "--tau 0: --backup soft-entropy divides by it; use --backup hard, *",
        "--backup soft-kl --tau 0":
            "--tau 0: --backup soft-kl divides by it; use --backup hard, its limit at 0, or at "
            "least 1e-6",
        "--backup hard --tau 0 --exploration boltzmann":
            "--tau 0: --exploration boltzmann divides by it; use --exploration epsilon-greedy, *",
        "--learning-starts 3": "--learning-starts 3 is too small for --num-envs 8 with --n-step 1: "
                               "the least is 16",
        "--buffer-size 40": "--buffer-size 40 is too small for --num-envs 8 with --n-step 1: the "
                            "least is 48",
        "--buffer-size 10000000": "--buffer-size 10000000: the replay memory needs 65.76 GiB of *"
                                  ", 8.00 GiB are free",
        "--batch-size 100000": "--batch-size 100000 with --n-step 1 needs 23.28 GiB of *, "
                               "8.00 GiB are free",
        "--resume own --backup hard": "--backup hard: the run to resume has soft-entropy",
    },
}
WITHOUT_GPU = {"--device cuda": "--device cuda: PyTorch sees no CUDA device here; use --device cpu"}
if not torch.cuda.is_available():
    EVERY |= WITHOUT_GPU


def contents(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def prepare(script, folder):
    """What the lines of the table need."""
    (folder / "file").write_text("a file")
    args = dataclasses.asdict(script.Args())
    args["schedule_timesteps"] = args["total_timesteps"]  # as in every checkpoint
    for name, code, extra in (("own", script.__name__, {}), ("other", "other", {}),
                              ("future", script.__name__, dict(zeta=1))):
        (folder / name).mkdir()
        saved = dict(format=script.FORMAT, script=code, step=400_000, args=args | extra)
        torch.save(saved, folder / name / "checkpoint.pt")
    (folder / "empty").mkdir()


def is_one_sentence(err, sentence):
    pattern = ".*".join(map(re.escape, f"error: {sentence}\n".split("*")))
    return re.fullmatch(pattern, err) is not None and err.count("\n") == 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_bad_flags_end_with_one_sentence_and_exit_code_2(name, monkeypatch, capsys, tmp_path):
    """In one process, as each line takes milliseconds; all that are answered wrongly are listed."""
    script = importlib.import_module(name)
    prepare(script, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "free_bytes", lambda cuda: 2**33)
    monkeypatch.setattr(script, "Atari", None)  # a run that began after all would end here
    before, wrong = contents(tmp_path), []
    for line, sentence in (EVERY | OWN[name]).items():
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *line.split()])
        try:
            script.main(script.Args, script.train, script.__doc__)
            code = 0
        except BaseException as e:
            code = e.code if isinstance(e, SystemExit) else e
        out, err = capsys.readouterr()
        if not (code == 2 and is_one_sentence(err, sentence) and not out):
            wrong.append((line, code, err, out))
        assert contents(tmp_path) == before, line
    assert not wrong, "\n".join(map(str, wrong))


def test_the_table_is_large():
    lines = sum(len(EVERY | OWN[name]) for name in SCRIPTS)
    assert len(set().union(EVERY, *OWN.values())) > 60 and lines > 300


@pytest.mark.parametrize("name, line", [
    ("a2c_naive", "--gamma abc"), ("a2c_proper", "--taus 1"), ("soft_dqn", "--backup max"),
    ("pgql_equiv", "--tau 0 --parameterization q"), ("natural_pg_damped", "--eps 1.5")])
def test_bad_flags_in_a_process_of_their_own(name, line, tmp_path):
    command = [sys.executable, ROOT / f"{name}.py", *line.split()]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=120)
    assert done.returncode == 2 and is_one_sentence(done.stderr, (EVERY | OWN[name])[line])
    assert not done.stdout and not os.listdir(tmp_path)


def parsed(script, monkeypatch, line):
    """The flags with which a command line would train."""
    args = []
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *line.split()])
    script.main(script.Args, args.append, script.__doc__)
    return args[0]


def test_good_lines_are_left_alone(script, monkeypatch, capsys):
    """Other spellings of flags and numbers; nothing is refused that tyro takes."""
    line = "--num_envs=4 --no-fast --gamma 1 --seed 1_000 --tau 1e-3 --resume= --tensorboard"
    args = parsed(script, monkeypatch, line)
    assert (args.num_envs, args.fast, args.gamma, args.seed) == (4, False, 1.0, 1000)
    assert (args.tau, args.resume, args.tensorboard) == (1e-3, "", True)
    assert capsys.readouterr() == ("", "")
    if script.__name__ == "pgql_equiv":
        assert parsed(script, monkeypatch, "--vf-coef theory").vf_coef == "theory"
        assert parsed(script, monkeypatch, "--vf-coef 2").vf_coef == 2.0


def test_help_is_printed_and_a_mistake_that_is_not_understood_is_tyros(shared, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(shared, monkeypatch, "--help")
    out, err = capsys.readouterr()
    assert stop.value.code in (0, None) and "--total-timesteps INT" in out and not err
    monkeypatch.setattr(shared, "mistake_in", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        parsed(shared, monkeypatch, "--taus 1")
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and "--taus" in err and not out


def test_tensorboard_without_its_package(shared, monkeypatch, capsys):
    monkeypatch.setattr(shared.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["a2c_proper.py", "--tensorboard"])
    with pytest.raises(SystemExit) as stop:
        shared.main(shared.Args, shared.train, shared.__doc__)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and is_one_sentence(err, "--tensorboard needs the package: pip *")


def test_every_number_has_limits_and_its_default_is_within(script):
    limits = script.LIMITS | script.RUN_LIMITS
    for field in dataclasses.fields(script.Args):
        if "int" in str(field.type) or "float" in str(field.type):
            low, high = limits[field.name]
            assert low <= field.default <= high, field.name
    assert limits.keys() <= {field.name for field in dataclasses.fields(script.Args)}
