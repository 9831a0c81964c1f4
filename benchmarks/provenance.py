"""What a committed measurement was made with: goes beside its CSV."""
import os
import platform
import sys
import time
from pathlib import Path
from subprocess import getoutput as sh

import ale_py
import gymnasium as gym
import numpy as np
import torch

def provenance(**more):
    """A dict for json.dumps: command, time, commit, versions and hardware."""
    return dict(
        command=sys.argv, time=time.ctime(),
        commit=sh(f'git -C "{Path(__file__).parent}" describe --always --dirty'),
        python=sys.version.split()[0], platform=platform.platform(), cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        hardware=sh("grep -m1 'model name' /proc/cpuinfo; nvidia-smi -L 2>&-"),
        **{m.__name__: m.__version__ for m in (torch, np, gym, ale_py)}, **more)
