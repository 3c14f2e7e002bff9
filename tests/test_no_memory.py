"""FSDP2's gradients are wrappers without memory of their own: a step is made with what is inside."""

import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

# A process of its own, so that a wrong address is a failure and not the end of the run.
CODE = """
import copy, sys, torch, fusedstep, torch.distributed as dist
from torch.distributed.fsdp import fully_shard

def train(name, options, backend):
    plain = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 3))
    models = plain, fully_shard(copy.deepcopy(plain))
    optimizers = [getattr(fusedstep, name)(model.parameters(), backend=backend, **options) for model in models]
    for number in range(3):
        batch = torch.randn(4, 16)
        for model, optimizer in zip(models, optimizers):
            model(batch).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=number != 1)
    for a, b in zip(*(model.parameters() for model in models)):
        assert torch.equal(a, b.full_tensor()), (a, b)

dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
torch.manual_seed(0)
for job in eval(sys.argv[1]):
    print(job, flush=True)
    train(*job)
dist.destroy_process_group()
print("the same bits")
"""


OPTIMIZERS = [("AdamW", {}), ("SGD", {"lr": 0.1}), ("AdamW", {"zero_grads": True}), ("Lion", {"ema_decay": 0.9})]


def test_fsdp2_on_one_rank_has_the_bits_of_the_plain_model():
    jobs = [(*optimizer, backend) for optimizer in OPTIMIZERS for backend in ("cpu", "reference")]
    command = [sys.executable, "-W", "ignore", "-c", CODE, repr(jobs)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, (result.stdout, result.stderr)
    assert result.stdout.splitlines() == [*map(str, jobs), "the same bits"]
