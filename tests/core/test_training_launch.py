"""`accelerate launch`: two processes give the weights of one, at the same global batch."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from diffkit.core.training import load_tensors

# 51 samples in batches of 16: batches reach over the end of an epoch
SCRIPT = """
import sys
import torch
from diffkit.core.training import fit
from torch import nn

torch.manual_seed(4)
model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
x = torch.randn(51, 3, generator=torch.Generator().manual_seed(0))
loss = lambda m, b: (m(b[0]) - b[1]).square().mean()
how = dict(batch_size=16, ema=0.9, clip=0.5, schedule="cosine", progress=False)
fit(model, loss, (x, x.sum(1, keepdim=True)), 30, 1e-2, checkpoint=sys.argv[1], **how)
"""
# on the processor, `accelerate launch` starts several processes by its launcher for several GPUs
# only: `--cpu --num_processes 2` would start one, without a word
KINDS = {1: ["--cpu"], 2: ["--multi_gpu", "--num_machines", "1", "--main_process_port"]}


def free_port():  # port 0, "any", never answers in torch 2.4
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return str(s.getsockname()[1])


def launch(folder, n):
    (folder / "train.py").write_text(SCRIPT)
    how = ["--num_processes", str(n), "--mixed_precision", "no", "--dynamo_backend", "no"]
    kind = [*KINDS[n], free_port()] if n > 1 else KINDS[n]
    cmd = [sys.executable, "-m", "accelerate.commands.launch", *kind, *how]
    env = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    cmd += [str(folder / "train.py"), str(folder / f"{n}")]
    done = subprocess.run(cmd, capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_tensors(folder / f"{n}")


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(tmp_path):
    (one, about_one), (two, about_two) = launch(tmp_path, 1), launch(tmp_path, 2)
    assert '["processes", 2]' in json.dumps(about_two["setting"])  # both were there
    assert about_one["samples"] == about_two["samples"]
    weights = [k for k in one if k.startswith(("model", "ema"))]
    assert len(weights) == 8 and set(weights) <= set(two)
    for k in weights:
        torch.testing.assert_close(one[k], two[k], atol=1e-6, rtol=1e-5)
