"""The numbers of a transformer that its memory and compute follow from, read from its config; no torch here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BUCKETS = 32  # of relative positions, in T5's config unless it says otherwise
# Tensors the size of a feed-forward layer that an activation function keeps for its gradient, as transformers
# computes it: ReLU keeps its output, which is the next layer's input, and GELU's tanh form every step.
KEPT_BY_ACTIVATION = {"relu": 0, "silu": 1, "swish": 1, "gelu": 1, "gelu_new": 4, "gelu_pytorch_tanh": 1}
LIKE_LLAMA = ("llama", "mistral", "qwen2")


@dataclass(frozen=True)
class Shape:
    """A T5 (`encoder_layers` > 0) or a decoder like Llama's.

    `inner` is the width of all queries, `keys` that of the keys and of the values (narrower with grouped
    queries). `biases` counts the biases of a decoder layer.
    """

    width: int
    encoder_layers: int
    decoder_layers: int
    heads: int
    inner: int
    keys: int
    feed_forward: int
    vocabulary: int
    activation: str
    gated: bool
    tied: bool
    biases: int
    buckets: int
    dropout: float
    positions: int | None

    @property
    def is_encoder_decoder(self) -> bool:
        """True for T5."""
        return self.encoder_layers > 0

    @property
    def attention(self) -> int:
        """Weights of one attention: queries, keys, values, output."""
        return 2 * self.width * (self.inner + self.keys)

    @property
    def linear(self) -> int:
        """Weights of all linear layers but the head: what NF4 quantises."""
        layers, crossed = self.encoder_layers + self.decoder_layers, self.decoder_layers
        attentions = layers + (crossed if self.is_encoder_decoder else 0)
        return attentions * self.attention + layers * (3 if self.gated else 2) * self.width * self.feed_forward

    @property
    def embeddings(self) -> int:
        """Weights of the embeddings, and of a head that is not tied to them."""
        return self.vocabulary * self.width * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All parameters."""
        norms = 2 * self.encoder_layers + (3 if self.is_encoder_decoder else 2) * self.decoder_layers
        norms += 2 if self.is_encoder_decoder else 1  # at the ends of encoder and decoder
        positions = 2 * self.buckets * self.heads if self.is_encoder_decoder else 0
        return (
            self.embeddings + self.linear + norms * self.width + positions + self.decoder_layers * self.biases
        )


def config_of(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the model that `base.architecture` of params.yaml builds.

    The tokenizer may learn fewer tokens than `vocabulary` from a small corpus; then the model is smaller.
    """
    width, heads = architecture["d_model"], architecture["heads"]
    if architecture["family"] == "t5":
        return {
            "model_type": "t5",
            "vocab_size": architecture["vocabulary"],
            "d_model": width,
            "d_kv": width // heads,
            "d_ff": architecture["d_ff"],
            "num_layers": architecture["layers"],
            "num_heads": heads,
            "dropout_rate": architecture["dropout"],
            "feed_forward_proj": "gated-silu",
            "tie_word_embeddings": True,
        }
    return {
        "model_type": "llama",
        "vocab_size": architecture["vocabulary"],
        "hidden_size": width,
        "intermediate_size": architecture["d_ff"],
        "num_hidden_layers": architecture["layers"],
        "num_attention_heads": heads,
        "attention_dropout": architecture["dropout"],
        "attention_bias": True,
        "max_position_embeddings": architecture["positions"],
        "tie_word_embeddings": True,
    }


def has_own_head(config: Mapping[str, Any]) -> bool:
    """Whether the head is apart from the embeddings.

    T5 1.1 says so by `tie_word_embeddings: false`, or, saved by newer versions of transformers, by outputs that
    are not scaled.
    """
    if config["model_type"] == "t5":
        return not (config.get("tie_word_embeddings", True) and config.get("scale_decoder_outputs", True))
    return not config.get("tie_word_embeddings", False)


def shape_of(config: Mapping[str, Any]) -> Shape | None:
    """The shape in a config.json; None for an architecture that is neither T5 nor like Llama."""
    if config.get("model_type") == "t5":
        return _t5(config)
    if config.get("model_type") in LIKE_LLAMA:
        return _llama(config)
    return None


def _t5(config: Mapping[str, Any]) -> Shape:
    projection = config.get("feed_forward_proj", "relu").split("-")
    name = projection[-1]
    inner = config["num_heads"] * config["d_kv"]
    return Shape(
        width=config["d_model"],
        encoder_layers=config["num_layers"],
        decoder_layers=config.get("num_decoder_layers") or config["num_layers"],
        heads=config["num_heads"],
        inner=inner,
        keys=inner,
        feed_forward=config["d_ff"],
        vocabulary=config["vocab_size"],
        activation="gelu_new" if config.get("feed_forward_proj") == "gated-gelu" else name,
        gated=projection[0] == "gated",
        tied=not has_own_head(config),
        biases=0,
        buckets=config.get("relative_attention_num_buckets", BUCKETS),
        dropout=config.get("dropout_rate", 0.1),
        positions=None,
    )


def _llama(config: Mapping[str, Any]) -> Shape:
    width, heads, ff = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    size = config.get("head_dim") or width // heads
    inner, keys = heads * size, (config.get("num_key_value_heads") or heads) * size
    biases = inner + 2 * keys if config["model_type"] == "qwen2" else 0
    biases += inner + 2 * keys + width if config.get("attention_bias") else 0
    biases += 2 * ff + width if config.get("mlp_bias") else 0
    return Shape(
        width=width,
        encoder_layers=0,
        decoder_layers=config["num_hidden_layers"],
        heads=heads,
        inner=inner,
        keys=keys,
        feed_forward=ff,
        vocabulary=config["vocab_size"],
        activation=config.get("hidden_act", "silu"),
        gated=True,
        tied=not has_own_head(config),
        biases=biases,
        buckets=0,
        dropout=config.get("attention_dropout", 0.0),
        positions=config.get("max_position_embeddings"),
    )
