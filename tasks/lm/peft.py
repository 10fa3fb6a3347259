"""Ways to train fewer parameters: PEFT adapters, a quantised base under one, and selective tuning.

| method          | trained                                   | source                     |
|-----------------|-------------------------------------------|----------------------------|
| `full`          | everything                                |                            |
| `lora`          | low-rank updates of linear layers         | Hu et al. 2021, 2106.09685 |
| `qlora`         | the same, on a base in 4-bit NormalFloat  | Dettmers 2023, 2305.14314  |
| `prompt_tuning` | embeddings in front of the prompt         | Lester 2021, 2104.08691    |
| `prefix_tuning` | keys and values in front of every layer   | Li & Liang 2021, 2101.00190|
| `ia3`           | scales on keys, values and feed-forward   | Liu 2022, 2205.05638       |
| `bitfit`        | parameters chosen by name: biases, norms  | Zaken 2021, 2106.10199     |
"""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tasks.lm.device import device, precision
from tasks.lm.model import ADAPTER_CONFIG, LanguageModel, attach, is_adapter, load_model
from tasks.stage import Compute, ParamsError, UserError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

ENCODER = r"(.*\.)?encoder\..*"  # names of an encoder's modules
ADAPTERS = ("lora", "qlora", "prompt_tuning", "prefix_tuning", "ia3")


def adapt(lm: LanguageModel, method: str, options: Mapping[str, Any]) -> LanguageModel:
    """Choose what is trained in `lm`, whose model is changed in place.

    `options` are those of the method: `lora` and `qlora` take `r`, `alpha`, `dropout` and `target_modules`
    (None: the layers PEFT knows for the architecture), and `encoder: False` where an encoder shall stay as it
    is; `prompt_tuning` and `prefix_tuning` take `virtual_tokens`; `ia3` takes `target_modules` and
    `feedforward_modules`; `bitfit` takes `parameters`, parts of parameter names. `qlora` wants a model from
    `load_nf4`. Raises ParamsError when nothing would be trained.
    """
    lm.model.requires_grad_(method == "full")
    if method == "bitfit":
        _select(lm.model, options["parameters"])
    if method not in ADAPTERS:
        return lm
    if method == "qlora":
        from peft import prepare_model_for_kbit_training

        prepare_model_for_kbit_training(lm.model, use_gradient_checkpointing=False)
    try:
        return LanguageModel(_wrap(lm.model, adapter_config(lm, method, options)), lm.tokenizer)
    except ValueError as error:  # no such modules, or an architecture PEFT does not know
        raise ParamsError(f"{method} on {lm.model.config.model_type}: {str(error).splitlines()[0]}") from error


def adapter_config(lm: LanguageModel, method: str, options: Mapping[str, Any]) -> "PeftConfig":
    """PEFT's config of a method."""
    from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, TaskType

    task = TaskType.SEQ_2_SEQ_LM if lm.is_encoder_decoder else TaskType.CAUSAL_LM
    match method:
        case "lora" | "qlora":
            return LoraConfig(
                task_type=task,
                r=options["r"],
                lora_alpha=options["alpha"],
                lora_dropout=options["dropout"],
                target_modules=options["target_modules"],
                exclude_modules=None if options.get("encoder", True) or not lm.is_encoder_decoder else ENCODER,
            )
        case "prompt_tuning":
            # Started from real words, which does better than random vectors (Lester et al. 2021, §3.2).
            return PromptTuningConfig(
                task_type=task,
                num_virtual_tokens=options["virtual_tokens"],
                prompt_tuning_init="SAMPLE_VOCAB",
            )
        case "prefix_tuning":
            return PrefixTuningConfig(task_type=task, num_virtual_tokens=options["virtual_tokens"])
        case "ia3":
            return IA3Config(
                task_type=task,
                target_modules=options["target_modules"],
                feedforward_modules=options["feedforward_modules"],
            )
    raise ValueError(f"{method} is not an adapter")


def load_nf4(folder_or_id: str | Path, compute: Compute, revision: str | None = None) -> LanguageModel:
    """A base for `qlora`: weights of linear layers in double-quantised NF4, the rest as `load` gives it.

    Raises ParamsError when bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ParamsError("finetune.method: qlora needs bitsandbytes; install it: pip install '.[qlora]'")
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=precision(compute),
    )
    options = {"quantization_config": quantisation, "device_map": {"": device(compute)}, "dtype": torch.float32}
    model = load_model(folder_or_id, revision, **options)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # The kernel that answers on such CPUs has no gradient, and once used it stays for training too.
            module.support_avx512bf16_for_cpu = False
    return attach(model, folder_or_id, revision)


def merged(lm: LanguageModel) -> LanguageModel:
    """The model as one without adapter: LoRA and IA3 are merged into the weights, in place.

    Raises ParamsError for prompt and prefix tuning: virtual tokens are no change of weights.
    """
    if not is_adapter(lm):
        return lm
    if not hasattr(lm.model.base_model, "merge_and_unload"):
        raise ParamsError(
            "finetune.method: a model with virtual tokens (prompt_tuning, prefix_tuning) cannot become one "
            "without adapter; use lora, ia3, bitfit or full"
        )
    return LanguageModel(lm.model.merge_and_unload(), lm.tokenizer)


def merged_to_answer(lm: LanguageModel) -> LanguageModel:
    """The model with LoRA or IA3 merged, as both slow answers down, if its weights are float32: others would be
    rounded anew. Any other model as it is.
    """
    mergeable = is_adapter(lm) and hasattr(lm.model.base_model, "merge_and_unload")
    if not mergeable or any(parameter.dtype != torch.float32 for parameter in lm.model.parameters()):
        return lm
    return merged(lm)


def parameter_counts(lm: LanguageModel) -> tuple[int, int]:
    """Trainable and total parameters; tied ones count once, two 4-bit ones for each byte that holds them."""
    trainable = sum(parameter.numel() for parameter in lm.model.parameters() if parameter.requires_grad)
    total = sum(_size(parameter) for parameter in lm.model.parameters())
    return trainable, total


def base_of(folder: Path) -> str:
    """The folder or hub id that the adapter in `folder` belongs to."""
    base: str = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    return base


def open_adapter(base: "PreTrainedModel", folder: Path, trainable: bool) -> "PeftModel":
    """Put the adapter in `folder` on `base`. Raises UserError when its weights are not in safetensors."""
    from peft import PeftConfig
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():  # PEFT would look for pickled ones
        raise UserError(
            f"the adapter {folder} has no {SAFETENSORS_WEIGHTS_NAME}, and pickled weights are not opened: "
            "save it again with safetensors"
        )
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = not trainable
    config.base_model_name_or_path = base.name_or_path  # the base may lie elsewhere than at training
    model = _wrap(base, config)
    model.load_adapter(str(folder), "default", is_trainable=trainable)
    return model if trainable else model.eval().requires_grad_(False)


def save_adapter(model: "PeftModel", folder: Path) -> None:
    """Write the adapter's weights and config, the same bytes for the same weights."""
    for config in model.peft_config.values():
        for name, value in vars(config).items():
            if isinstance(value, set):  # PEFT writes a set in the order of its hashes
                setattr(config, name, sorted(value))
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()  # PEFT's model card is an empty form


def _wrap(model: "PreTrainedModel", config: "PeftConfig") -> "PeftModel":
    from peft import LoraConfig, PeftType, TaskType, get_peft_model

    from tasks.lm.lora import LoraLinear

    if isinstance(config, LoraConfig) and getattr(model, "quantization_method", None) is None:
        config._register_custom_module({nn.Linear: LoraLinear})
    if (config.peft_type, config.task_type) == (PeftType.PROMPT_TUNING, TaskType.CAUSAL_LM):
        return _prompt_tuned_causal(model, config)
    return get_peft_model(model, config)


def _prompt_tuned_causal(model: "PreTrainedModel", config: "PeftConfig") -> "PeftModel":
    """Prompt tuning of a causal model whose result does not depend on padding.

    PEFT drops position ids there, so that every padding token pushes the prompt one position away from the
    embeddings in front of it. Here positions are counted from the mask, embeddings included.
    """
    from peft import PeftModelForCausalLM

    class PromptTunedCausalLM(PeftModelForCausalLM):  # type: ignore[misc]
        def forward(
            self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **options: Any
        ) -> Any:
            embeddings, mask = self._behind_virtual_tokens(input_ids, attention_mask)
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            return self.base_model(
                inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, **options
            )

        def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
            embeddings, mask = self._behind_virtual_tokens(input_ids, attention_mask)
            new = self.base_model.generate(inputs_embeds=embeddings, attention_mask=mask, **options)
            return torch.cat((input_ids, new), dim=1)

        def _behind_virtual_tokens(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            virtual = self.get_prompt(batch_size=ids.shape[0]).to(self.word_embeddings.weight.dtype)
            ones = mask.new_ones(virtual.shape[:2])
            return torch.cat((virtual, self.word_embeddings(ids)), dim=1), torch.cat((ones, mask), dim=1)

    config.base_model_name_or_path = model.name_or_path
    return PromptTunedCausalLM(model, config)


def _select(model: nn.Module, parts: list[str]) -> None:
    chosen = [p for name, p in model.named_parameters() if any(part in name for part in parts)]
    if not chosen:
        raise ParamsError(f"finetune.bitfit.parameters: no parameter has {' or '.join(parts)} in its name")
    for parameter in chosen:
        parameter.requires_grad = True


def _size(parameter: Tensor) -> int:
    return parameter.numel() * (2 if type(parameter).__name__ == "Params4bit" else 1)
