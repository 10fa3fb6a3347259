"""A language model with its tokenizer: opened from, and written to, a folder in Hugging Face layout.

A folder is a full artifact (`AutoModel*.from_pretrained` opens it) or a PEFT adapter that names its base.
Weights are read from safetensors only, and no code that comes with a model is ever run.
"""

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from tasks.lm.attention import on_device
from tasks.lm.device import precision
from tasks.stage import Compute, UserError
from tasks.stage.files import new_folder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)  # by PEFT
logging.getLogger("bitsandbytes").setLevel("ERROR")  # on import it warns of kernels that a CPU can do without

ADAPTER_CONFIG = "adapter_config.json"
# What a model needs to generate at all. Everything else in a generation config is a decoding setting, and those
# come from params, so that a model's own file cannot change a result unseen.
_GENERATION_IDS = (
    "bos_token_id",
    "decoder_start_token_id",
    "eos_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "pad_token_id",
)


@dataclass(frozen=True)
class LanguageModel:
    """A model of either family and its tokenizer."""

    model: "PreTrainedModel | PeftModel"
    tokenizer: "PreTrainedTokenizerBase"

    @property
    def is_encoder_decoder(self) -> bool:
        """True for T5, BART …; False for GPT, Llama, Qwen …"""
        return bool(self.model.config.is_encoder_decoder)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(self.model.device)


def load(
    folder_or_id: str | Path, compute: Compute, revision: str | None = None, trainable: bool = False
) -> LanguageModel:
    """Open a full artifact, a PEFT folder (with the base it names) or a hub id.

    A model to be trained keeps float32 weights (mixed precision is the trainer's part); one that only answers
    takes the precision of `compute`. Raises UserError when there is no such model or it cannot be read.
    """
    disable_progress_bar()
    folder = Path(folder_or_id)
    if (folder / ADAPTER_CONFIG).is_file():
        return _load_adapter(folder, compute, trainable)
    dtype = torch.float32 if trainable else precision(compute)
    model = on_device(load_model(folder_or_id, revision, dtype=dtype), compute)
    return attach(model, folder_or_id, revision)


def load_model(folder_or_id: str | Path, revision: str | None = None, **options: Any) -> "PreTrainedModel":
    """The bare model of a full artifact or hub id, ready to answer, in the class its config asks for."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    try:
        config = AutoConfig.from_pretrained(folder_or_id, revision=revision, trust_remote_code=False)
        family = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = family.from_pretrained(
            folder_or_id,
            config=config,
            revision=revision,
            trust_remote_code=False,
            use_safetensors=True,
            **options,
        )
    except (OSError, ValueError) as error:
        raise _unreadable(folder_or_id, error) from error
    ids = {name: value for name, value in model.generation_config.to_dict().items() if name in _GENERATION_IDS}
    model.generation_config = GenerationConfig(**ids)
    return model.eval()


def attach(
    model: "PreTrainedModel | PeftModel", folder_or_id: str | Path, revision: str | None = None
) -> LanguageModel:
    """Give `model` the tokenizer of a folder or hub id.

    A tokenizer without a padding token pads with its end token: masks are made from lengths, never from ids.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder_or_id, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _unreadable(folder_or_id, error) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder_or_id}: the tokenizer has no end token, so that no answer could end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    return LanguageModel(model, tokenizer)


def save(lm: LanguageModel, folder: Path) -> None:
    """Write model (or adapter), tokenizer and generation config to `folder`, all or nothing.

    The same weights give the same bytes.
    """
    disable_progress_bar()
    with new_folder(folder) as temporary:
        if is_adapter(lm):
            from tasks.lm.peft import save_adapter

            save_adapter(lm.model, temporary)
        else:
            lm.model.save_pretrained(temporary)
        lm.model.generation_config.save_pretrained(temporary)
        lm.tokenizer.save_pretrained(temporary)


def bare(lm: LanguageModel) -> Any:
    """The model itself, which an adapter works in."""
    return lm.model.get_base_model() if is_adapter(lm) else lm.model


def is_adapter(lm: LanguageModel) -> bool:
    """Whether the model is a PEFT adapter on a base (asked without importing PEFT, which takes seconds)."""
    return any(parent.__name__ == "PeftModel" for parent in type(lm.model).__mro__)


def _load_adapter(folder: Path, compute: Compute, trainable: bool) -> LanguageModel:
    from tasks.lm.peft import base_of, open_adapter

    base = load(base_of(folder), compute, trainable=trainable)
    return attach(open_adapter(base.model, folder, trainable), folder)


def _unreadable(folder_or_id: str | Path, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0]
    return UserError(f"cannot open the model {folder_or_id} (a local folder or a hub id): {reason}")
