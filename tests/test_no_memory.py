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

name, backend, options = sys.argv[1], sys.argv[2], eval(sys.argv[3])
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
torch.manual_seed(0)
plain = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 3))
sharded = fully_shard(copy.deepcopy(plain))
optimizers = [getattr(fusedstep, name)(model.parameters(), backend=backend, **options) for model in (plain, sharded)]
for number in range(3):
    batch = torch.randn(4, 16)
    for model, optimizer in zip((plain, sharded), optimizers):
        model(batch).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=number != 1)
for a, b in zip(plain.parameters(), sharded.parameters()):
    assert torch.equal(a, b.full_tensor()), (a, b)
dist.destroy_process_group()
print("the same bits")
"""


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("AdamW", {}), ("SGD", {"lr": 0.1}), ("AdamW", {"zero_grads": True}), ("Lion", {"ema_decay": 0.9})],
    ids=str,
)
def test_fsdp2_on_one_rank_has_the_bits_of_the_plain_model(name, options, backend):
    command = [sys.executable, "-W", "ignore", "-c", CODE, name, backend, repr(options)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "the same bits"
