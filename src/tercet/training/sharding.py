"""FSDP2: weights, gradients and optimizer state in shares, one for each process."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from tercet.errors import InputError
from tercet.models import Encoder
from tercet.models.checkpoint import encoder_from_spec, encoder_spec
from tercet.models.engine.packing import layer_stack
from tercet.types import Inputs, TokenBatch

FSDP2 = "fsdp2"


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's, over all processes; a checkpoint is one file with whole weights, as without shares."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """The processes are known now."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def shard(encoder: Encoder, mesh: DeviceMesh) -> None:
    """Each layer of the backbone is gathered when it is its turn, and all else of the encoder together.

    Under recomputation once a step: FSDP2 takes the layers of a second chunk, computed again in the backward pass, for
    gathered, and the gradient is wrong in silence where they are not.
    """
    if is_sharded(encoder):
        return
    stack = layer_stack(encoder.backbone) if encoder.kind == "text" else None
    if stack is None:
        raise InputError(
            "trainer.strategy=fsdp2 shares out a text encoder's stack of layers, and this model has none. Use trainer=ddp."
        )
    once = encoder.execution.recompute
    for part in (*stack, encoder):
        fully_shard(part, mesh=mesh, reshard_after_forward=False if once else None).set_reshard_after_backward(not once)


def reshard(encoder: Encoder) -> None:
    """Forget what has been gathered: the optimizer is about to change the shares."""
    for part in encoder.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def is_sharded(module: nn.Module) -> bool:
    """Whether the weights are in shares."""
    return any(isinstance(p, DTensor) for p in module.parameters())


def equalized_forward(encoder: Encoder, inputs: Inputs) -> Tensor:
    """``encoder(inputs)``, where every process gathers a layer as often as the others do.

    Chunks are as many as rows are long, not the same in all processes: those with fewer run a row again, for nothing.
    """
    more = 0
    if isinstance(inputs, TokenBatch) and is_sharded(encoder):
        most = torch.tensor(own := encoder.execution.num_passes(inputs), device=encoder.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        more, row = int(most) - own, inputs.select(torch.tensor([0]))
    z: Tensor = encoder(inputs)
    for _ in range(more):
        z = z + 0 * encoder(row).sum()
    return z


def unsharded(encoder: Encoder) -> Encoder:
    """The encoder itself, or one with all weights where they are in shares: all processes must call."""
    if not is_sharded(encoder):
        return encoder
    state = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in encoder.state_dict().items()}
    one = encoder_from_spec(encoder_spec(encoder))
    one.load_state_dict(state)
    return one.to(encoder.device).eval()


def load_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """``load_state_dict`` of whole weights, into shares if need be."""
    if is_sharded(module):
        set_model_state_dict(module, dict(state), options=StateDictOptions(full_state_dict=True))
    else:
        module.load_state_dict(state)


StrategyRegistry.register(FSDP2, FSDP2Strategy, description="FSDP2 over all processes")
