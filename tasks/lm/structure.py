"""What a language model is built of, and the same model with less of it.

A model has layers (of an encoder, of a decoder), and in them units that can go as a whole: heads of attention
and channels of feed-forward parts. All layers keep as many of them, so that a plain config says what is left.
Known are layers as T5 and as Llama have them (FLAN-T5, Qwen2, Mistral …). Where queries share keys and values,
a unit is a head of keys and values with all of its queries.
"""

import copy
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from tasks.lm.model import LanguageModel
from tasks.stage import ParamsError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The linear layers of a part by name: those that read (their rows are the units), and the one that writes (its
# columns are).
_ATTENTION = ((("q", "k", "v"), "o"), (("q_proj", "k_proj", "v_proj"), "o_proj"))
_FEED_FORWARD = ((("wi_0", "wi_1"), "wo"), (("wi",), "wo"), (("gate_proj", "up_proj"), "down_proj"))
_POSITIONS = "relative_attention_bias"  # of a T5: a column for each head, that all layers of a stack share


class Part(NamedTuple):
    """A parameter, and the dimension along which the units lie."""

    name: str
    dimension: int


class Units(NamedTuple):
    """`number` heads, or channels, that stand in the same order in all of some parameters."""

    kind: str  # heads or channels
    number: int
    parts: tuple[Part, ...]
    writers: tuple[str, ...]  # the linear layers through which they leave

    def cut(self, tensor: Tensor, dimension: int) -> Tensor:
        """A parameter as `[count, size of a unit, all else]`."""
        return tensor.movedim(dimension, 0).reshape(self.number, tensor.shape[dimension] // self.number, -1)

    def keep(self, tensor: Tensor, dimension: int, kept: Sequence[int]) -> Tensor:
        """A parameter with the units `kept` alone."""
        size = tensor.shape[dimension] // self.number
        rows = [unit * size + row for unit in kept for row in range(size)]
        return tensor.index_select(dimension, torch.tensor(rows, device=tensor.device))


def stacks(lm: LanguageModel) -> dict[str, nn.ModuleList]:
    """The layers of the encoder, where there is one, and of the decoder, by the name of their list."""
    roots = [lm.model.get_encoder()] if lm.is_encoder_decoder else []
    names = {id(module): name for name, module in lm.model.named_modules()}
    lists = [_layers(root) for root in [*roots, lm.model.get_decoder()]]
    return {names[id(layers)]: layers for layers in lists}


def linear_layers(lm: LanguageModel) -> dict[str, nn.Linear]:
    """The linear layers inside the stacks, by name; embeddings and the language-model head are none of them."""
    inside = tuple(f"{name}." for name in stacks(lm))
    return {
        name: module
        for name, module in lm.model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(inside)
    }


def units(lm: LanguageModel) -> list[Units]:
    """All heads and channels: for each entry, which of them stay can be chosen by itself.

    Heads of a T5's self-attention share what they know of positions with those of all layers: one entry.
    Raises ParamsError for a model with other layers.
    """
    config = lm.model.config
    heads: int = getattr(config, "num_key_value_heads", config.num_attention_heads)
    found: list[Units] = []
    for stack, layers in stacks(lm).items():
        together: list[Units] = []
        for name, module in layers.named_modules(prefix=stack):
            attention, channels = _parts(name, module, _ATTENTION), _parts(name, module, _FEED_FORWARD)
            if attention:
                one = Units("heads", heads, *attention)
                (together if _shares_positions(lm, stack, name) else found).append(one)
            elif channels:
                reader = channels[0][0]
                found.append(Units("channels", lm.model.get_parameter(reader.name).shape[0], *channels))
        if together:
            parts = tuple(part for each in together for part in each.parts)
            writers = tuple(writer for each in together for writer in each.writers)
            found.append(Units("heads", heads, parts, writers))
    if {each.kind for each in found} != {"heads", "channels"}:
        raise ParamsError(
            f"{config.model_type}: its layers are neither those of T5 nor those of Llama, so that its heads "
            "and channels are not known"
        )
    return found


def unrotated_attentions(lm: LanguageModel) -> list[str]:
    """The attentions of a T5, by name: their queries and keys meet as they are, wherever they stand."""
    readers, writer = _ATTENTION[0]
    return [
        name
        for name, module in lm.model.named_modules()
        if {*readers, writer} <= {child for child, _ in module.named_children()}
    ]


def with_layers(lm: LanguageModel, encoder: int | None, decoder: int | None) -> LanguageModel:
    """A copy with so many layers (None: all of them), spread evenly from the first to the last; one: the last.

    Raises ParamsError when the model has not as many.
    """
    wanted = [encoder, decoder] if lm.is_encoder_decoder else [decoder]
    chosen: dict[str, list[int]] = {}
    for (name, layers), count in zip(stacks(lm).items(), wanted, strict=True):
        if count is not None and count > len(layers):
            raise ParamsError(f"{name} has {len(layers)} layers, and {count} are wanted; ask for fewer")
        chosen[name] = evenly(len(layers), len(layers) if count is None else count)
    config = copy.deepcopy(lm.model.config)
    set_layers(config, *(len(numbers) for numbers in chosen.values()))
    given: dict[str, Tensor] = lm.model.state_dict()

    def source(name: str) -> Tensor:
        for stack, numbers in chosen.items():
            if found := re.match(rf"{re.escape(stack)}\.(\d+)\.", name):
                same = f"{stack}.{numbers[int(found[1])]}.{name[found.end() :]}"
                return given[same if same in given else name]  # what the first alone has stays there
        return given[name]

    return rebuilt(lm, config, source)


def with_units(lm: LanguageModel, kept: Sequence[tuple[Units, Sequence[int]]]) -> LanguageModel:
    """A copy in which each entry of `units` keeps the ones beside it: as many of a kind everywhere."""
    config = copy.deepcopy(lm.model.config)
    for entry, numbers in kept:
        if entry.kind == "channels":
            set_channels(config, len(numbers))
        else:
            set_heads(config, len(numbers))
    cuts = {part.name: (entry, part.dimension, numbers) for entry, numbers in kept for part in entry.parts}
    given: dict[str, Tensor] = lm.model.state_dict()

    def source(name: str) -> Tensor:
        if name not in cuts:
            return given[name]
        entry, dimension, numbers = cuts[name]
        return entry.keep(given[name], dimension, numbers)

    return rebuilt(lm, config, source)


def rebuilt(lm: LanguageModel, config: "PretrainedConfig", source: Callable[[str], Tensor]) -> LanguageModel:
    """A model of `config` on the same device, each of its tensors from `source`, and the same tokenizer."""
    model = type(lm.model)(config).to(lm.device, lm.model.dtype)
    model.load_state_dict({name: source(name) for name in model.state_dict()})
    model.generation_config = copy.deepcopy(lm.model.generation_config)
    return LanguageModel(model.eval(), lm.tokenizer)


def evenly(count: int, wanted: int) -> list[int]:
    """`wanted` of the numbers 0 … count − 1, as far from each other as can be, the last among them."""
    if wanted == 1:
        return [count - 1]
    return [round(place * (count - 1) / (wanted - 1)) for place in range(wanted)]


def set_layers(config: "PretrainedConfig", *counts: int) -> None:
    """Write the numbers of layers into a config: of the encoder, where there is one, and of the decoder."""
    if config.is_encoder_decoder:
        name = "num_decoder_layers" if hasattr(config, "num_decoder_layers") else "decoder_layers"
        setattr(config, name, counts[-1])
    config.num_hidden_layers = counts[0]
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[: counts[0]]


def set_heads(config: "PretrainedConfig", count: int) -> None:
    """Write the number of heads (of keys and values) into a config; their size stays."""
    queries = config.num_attention_heads // getattr(config, "num_key_value_heads", config.num_attention_heads)
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    config.num_attention_heads = count * queries
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = count


def set_channels(config: "PretrainedConfig", count: int) -> None:
    """Write the number of channels of a feed-forward part into a config."""
    setattr(config, "d_ff" if hasattr(config, "d_ff") else "intermediate_size", count)


def _layers(root: nn.Module) -> nn.ModuleList:
    return next(child for child in root.children() if isinstance(child, nn.ModuleList))


def _parts(
    name: str, module: nn.Module, known: Sequence[tuple[tuple[str, ...], str]]
) -> tuple[tuple[Part, ...], tuple[str, ...]] | None:
    """The parameters of an attention or a feed-forward part that are cut by unit, and the layer that writes."""
    children = {child for child, _ in module.named_children()}
    for readers, writer in known:
        if {*readers, writer} <= children:
            parts = [Part(f"{name}.{reader}.weight", 0) for reader in readers]
            parts += [
                Part(f"{name}.{reader}.bias", 0)
                for reader in readers
                if module.get_submodule(reader).bias is not None
            ]
            parts.append(Part(f"{name}.{writer}.weight", 1))
            if _POSITIONS in children:
                parts.append(Part(f"{name}.{_POSITIONS}.weight", 1))
            return tuple(parts), (f"{name}.{writer}",)
    return None


def _shares_positions(lm: LanguageModel, stack: str, attention: str) -> bool:
    """Whether the first layer of the stack has position biases that this attention uses too."""
    inside = re.sub(r"^\d+", "0", attention.removeprefix(f"{stack}."))
    first = lm.model.get_submodule(f"{stack}.{inside}")
    return any(child == _POSITIONS for child, _ in first.named_children())
