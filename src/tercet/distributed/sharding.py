"""FSDP2: weights, gradients and optimizer state are sharded over all processes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from tercet.distributed.gather import largest
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
    stack = layers_to_shard(encoder)
    equal = _EqualPasses()
    encoder.register_forward_pre_hook(equal.count)
    encoder.register_forward_hook(equal.complete)  # before FSDP2's, which frees the gathered weights
    once = encoder.execution.recompute
    for part in (*stack, encoder):
        fully_shard(part, mesh=mesh, reshard_after_forward=False if once else None).set_reshard_after_backward(not once)


def layers_to_shard(encoder: "Encoder") -> nn.ModuleList:
    """The encoder's stack of layers; ``InputError`` where there is not exactly one."""
    stack = encoder.layer_stack()
    if stack is None:
        raise InputError("FSDP2 shards a text encoder's stack of layers, and this model has none, or two. Use DDP instead.")
    return stack


def reshard(encoder: "Encoder") -> None:
    """Free the gathered weights, before the optimizer changes the shards."""
    for part in encoder.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def is_sharded(module: nn.Module) -> bool:
    """Whether any weight is sharded."""
    return any(isinstance(part, FSDPModule) for part in module.modules())  # weights are whole while they are gathered


class _EqualPasses:
    """Hooks of a sharded encoder: every process runs as many chunks as the one with the most.

    Each chunk gathers the layers from all processes. Processes with fewer encode one row again, multiplied by zero.
    """

    more = 0

    def count(self, encoder: "Encoder", arguments: tuple[Any, ...]) -> None:
        """Before the first chunk: how many will be missing here."""
        own = len(encoder.execution_for(arguments[0]).chunks(arguments[0].lengths))
        self.more = largest(own) - own

    def complete(self, encoder: "Encoder", arguments: tuple[Any, ...], z: Tensor) -> Tensor:
        """After the last one: run those."""
        row = arguments[0].select(torch.tensor([0]))
        for _ in range(self.more):
            z = z + 0 * encoder.run(row, encoder.execution_for(row)).sum()
        return z


def gather_weights(encoder: "Encoder") -> "Encoder":
    """The encoder, or a copy with whole weights in eval mode where it is sharded; every process must call it."""
    from tercet.models.folder import encoder_from_spec, encoder_spec

    if not is_sharded(encoder):
        return encoder
    state = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in encoder.state_dict().items()}
    with torch.random.fork_rng(devices=[]):  # its first weights are drawn at random: training must not notice
        whole = encoder_from_spec(encoder_spec(encoder))
    whole.load_state_dict(state)
    return whole.to(encoder.device).eval()


def load_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """``module.load_state_dict(state)`` of whole weights, also where the module is sharded."""
    if is_sharded(module):
        set_model_state_dict(module, dict(state), options=StateDictOptions(full_state_dict=True))
    else:
        module.load_state_dict(state)
