"""Command line that makes the demo: `python -m server.demo.train base --data DIR`."""

import argparse
from pathlib import Path
import torch
from rich.console import Console
from server.demo.train_base import train_base
p=argparse.ArgumentParser(); p.add_argument("what"); p.add_argument("--data",type=Path); p.add_argument("--out",type=Path); p.add_argument("--steps",type=int)
a=p.parse_args()
torch.set_num_threads(2)
r=train_base(a.data,a.out,steps=a.steps,seed=7,console=Console(),checkpoint_every_steps=400)
print(r)
