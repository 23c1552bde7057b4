"""A log-prob head sharded over two processes; a module of its own, so that they can import it."""

import copy

import torch
import torch.distributed as dist
from leaving import leave

from deeprec import linear_logprobs


class LogprobHead(torch.nn.Linear):
    """A head whose forward is the op, as FSDP wants it: parameters are whole in there."""

    def forward(self, hidden, ids):
        return linear_logprobs(hidden, self.weight, ids, bias=self.bias)


def train_sharded(rank, world, address):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LogprobHead(12, 40)
    whole = copy.deepcopy(model)
    mesh = torch.distributed.init_device_mesh("cpu", (world,))
    fully_shard(model, mesh=mesh)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 12, generator=generator)
    ids = torch.randint(0, 40, (8,), generator=generator)
    share = slice(rank * 4, rank * 4 + 4)
    (-model(hidden[share], ids[share]).mean()).backward()
    (-whole(hidden, ids).mean()).backward()
    for got, expected in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(got.grad.full_tensor(), expected.grad)
    assert isinstance(model.weight, DTensor)
    try:
        linear_logprobs(hidden, model.weight, ids)
    except TypeError as error:
        assert "full_tensor" in str(error)
    else:
        raise AssertionError("a sharded head outside its module must be refused")
    leave()
