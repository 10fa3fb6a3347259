"""A model is whole again after it was trained in parts."""

from dataclasses import dataclass

import torch
from lm_toys import toy
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import set_hf_deepspeed_config

from tasks.lm.sharded import make_whole, shell_of


@dataclass
class Stage3:
    """What transformers asks before it opens a model."""

    def is_zero3(self) -> bool:
        return True


def test_a_model_opened_after_training_in_parts_comes_whole() -> None:
    model = toy("llama").model
    shell = shell_of(model)
    found = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = Stage3()
    set_hf_deepspeed_config(config)
    assert is_deepspeed_zero3_enabled()
    make_whole(model, shell)
    assert not is_deepspeed_zero3_enabled()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, found[name])
