"""Makes a model whole again whose weights lay in parts on several processes while it was trained.

What trains it may have put its parts into other classes, with hooks, in place. A shell of the model as it was
takes the whole weights, and then the place of the model: whoever holds that keeps it. Every process must have
room for the whole weights, though not for gradients and optimizer states.
"""

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.integrations import unset_hf_deepspeed_config

if TYPE_CHECKING:
    from transformers import Trainer


def in_parts(trainer: "Trainer") -> bool:
    """Whether the weights will lie in parts on the processes: FSDP and ZeRO stage 3."""
    if trainer.is_deepspeed_enabled:
        return bool(trainer.accelerator.state.deepspeed_plugin.zero_stage == 3)
    return bool(trainer.is_fsdp_enabled)


def shares_embeddings(model: nn.Module) -> bool:
    """Whether several parts of the model, as encoder and decoder, look tokens up in the same weights."""
    tables = [part.weight for part in model.modules() if isinstance(part, nn.Embedding)]
    return len({id(weight) for weight in tables}) < len(tables)


def shell_of(model: nn.Module) -> nn.Module:
    """A copy of the model with all but the weights, which have no memory."""
    empty = {
        id(weight): nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=weight.requires_grad)
        for weight in model.parameters()
    }
    return copy.deepcopy(model, dict(empty))


def make_whole(model: nn.Module, shell: nn.Module) -> None:
    """Gather the weights of the model, as all processes must, and let the shell with them take its place."""
    with _gathered(list(model.parameters())):
        state = {name: _whole(tensor) for name, tensor in model.state_dict().items()}
    unset_hf_deepspeed_config()  # with it a model that is opened later would come in parts
    shell.load_state_dict(state, assign=True)
    shell.tie_weights()  # type: ignore[operator]
    model.__class__, model.__dict__ = shell.__class__, shell.__dict__


def _whole(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def _gathered(weights: list[nn.Parameter]) -> "AbstractContextManager[Any]":
    """A block in which the parts that DeepSpeed keeps are whole."""
    if not any(hasattr(weight, "ds_id") for weight in weights):
        return nullcontext()
    from deepspeed import zero

    return cast("AbstractContextManager[Any]", zero.GatheredParameters(weights))
