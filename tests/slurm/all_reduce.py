"""Run as one of four ranks on two nodes: sums rank + 1 with gloo and prints on which node it ran."""

import os
import socket

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.tensor(dist.get_rank() + 1.0)
dist.all_reduce(total)
# In one write: ranks share the console.
os.write(1, f"{socket.gethostname()} {os.environ['LOCAL_RANK']} {total.item()}\n".encode())
dist.destroy_process_group()
