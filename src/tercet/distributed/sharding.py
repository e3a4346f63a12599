"""FSDP2: weights, gradients and optimizer state are sharded over all processes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from tercet.errors import InputError

if TYPE_CHECKING:  # the models import this package
    from tercet.models import Encoder


def shard(encoder: "Encoder", mesh: DeviceMesh) -> None:
    """Shard a text encoder in place: one unit for each layer of the backbone, one for everything else.

    Under recomputation the layers are gathered once a step and stay gathered: FSDP2 does not gather them again for the
    second chunk that is recomputed in the backward pass, and the gradient would be wrong without an error.
    """
    if is_sharded(encoder):
        return
    stack = encoder.layer_stack()
    if stack is None:
        raise InputError("FSDP2 shards a text encoder's stack of layers, and this model has none. Use DDP instead.")
    once = encoder.execution.recompute
    for part in (*stack, encoder):
        fully_shard(part, mesh=mesh, reshard_after_forward=False if once else None).set_reshard_after_backward(not once)


def reshard(encoder: "Encoder") -> None:
    """Free the gathered weights, before the optimizer changes the shards."""
    for part in encoder.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def is_sharded(module: nn.Module) -> bool:
    """Whether any weight is sharded."""
    return any(isinstance(p, DTensor) for p in module.parameters())


def equalized_forward(encoder: "Encoder", inputs: Any) -> Tensor:
    """``encoder(inputs)``, with the same number of forward passes in every process where the weights are sharded.

    Each pass gathers the layers from all processes. Processes with fewer chunks encode one row again, multiplied by zero.
    """
    more = 0
    if is_sharded(encoder):
        most = torch.tensor(own := len(encoder.execution.chunks(inputs.lengths)), device=encoder.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        more, row = int(most) - own, inputs.select(torch.tensor([0]))
    z: Tensor = encoder(inputs)
    for _ in range(more):
        z = z + 0 * encoder(row).sum()
    return z


def gather_weights(encoder: "Encoder") -> "Encoder":
    """The encoder, or a copy with whole weights in eval mode where it is sharded; every process must call it."""
    from tercet.models.folder import encoder_from_spec, encoder_spec

    if not is_sharded(encoder):
        return encoder
    state = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in encoder.state_dict().items()}
    whole = encoder_from_spec(encoder_spec(encoder))
    whole.load_state_dict(state)
    return whole.to(encoder.device).eval()


def load_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """``module.load_state_dict(state)`` of whole weights, also where the module is sharded."""
    if is_sharded(module):
        set_model_state_dict(module, dict(state), options=StateDictOptions(full_state_dict=True))
    else:
        module.load_state_dict(state)
