"""What a committed measurement was made with: goes beside its CSV."""
import platform
import sys
import time
from subprocess import getoutput as sh

import ale_py
import gymnasium as gym
import numpy as np
import torch

def provenance(**more):
    """A dict for json.dumps: command, time, commit, versions and hardware."""
    return dict(
        command=sys.argv, time=time.ctime(), commit=sh("git describe --always --dirty"),
        python=sys.version.split()[0], platform=platform.platform(),
        threads=torch.get_num_threads(),
        hardware=sh("nproc; grep -m1 'model name' /proc/cpuinfo; nvidia-smi -L 2>&-"),
        **{m.__name__: m.__version__ for m in (torch, np, gym, ale_py)}, **more)
