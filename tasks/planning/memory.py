"""Bytes that training and answering take, as this code runs them.

Weights, gradients and Adam's two moments are 4 bytes a parameter each: 4 + 4 + 8 for what is trained. What a
layer keeps for its gradient is counted tensor by tensor, after Korthikanti et al. 2022 (2205.05198 §4.1), for
the layers of T5 and Llama as transformers computes them: root-mean-square norms, gated feed-forward parts,
and scaled dot-product attention, which keeps no matrix of scores unless T5's position bias is trained with it.
A frozen linear layer does not keep its input, so that a method that trains little also keeps less.

In mixed precision products are taken of bf16 copies: each layer that reads a state makes a copy of its own, and
so does each weight, until the backward pass. What stands between layers, and before norms, stays float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tasks.planning.shape import KEPT_BY_ACTIVATION, Shape

FLOAT, HALF = 4, 2
COPIES = "bf16 copies"  # of weights
ADAM = 8  # bytes of the two moments of a parameter, float32
NF4 = (
    0.5 + 1 / 64 + 4 / (64 * 256)
)  # bytes a weight: 4 bits, a byte for 64 of them, a float for 256 of those bytes
# Copies of the logits at the start of the backward pass: themselves, their log-softmax and its gradient; PPO
# divides them by a temperature, and keeps a softmax for the entropy.
LOGITS_OF_LOSS, LOGITS_OF_PPO, LOGITS_OF_ANSWERS = 3, 6, 3


@dataclass(frozen=True)
class Kept:
    """Whose inputs are kept: those of linear layers in attention and feed-forward part, of the head, of the
    weights of norms.

    `rank` is LoRA's, `copies` how often the output of a layer is copied for its update, `dropout` what stands
    before its first matrix. `scaled` is of IA3, whose scales keep what
    they multiply. `encoder` says whether the encoder keeps anything. `virtual` tokens stand before the prompt;
    where the encoder keeps nothing, before the keys and values of each layer.
    """

    attention: bool = False
    feed_forward: bool = False
    head: bool = False
    norms: bool = False
    rank: int = 0
    copies: int = 0
    dropout: float = 0.0
    scaled: bool = False
    encoder: bool = True
    virtual: int = 0


@dataclass(frozen=True)
class Target:
    """How a stage runs: on a GPU or not, in mixed precision or in float32, on batches with padding or without.

    With padding each row has a mask of its own, to which each of T5's layers adds its position bias.
    """

    gpu: bool = False
    mixed: bool = False
    padded: bool = True

    @property
    def width(self) -> int:
        """Bytes of a number that is a factor or result of a matrix product."""
        return HALF if self.mixed else FLOAT


CPU = Target()
ATTENTION_NAMES = {"q", "k", "v", "o", "q_proj", "k_proj", "v_proj", "o_proj"}


def kept(method: str, options: Mapping[str, Any], on: Target = CPU) -> Kept:
    """What is kept for the gradients of a method (tasks/lm/peft.py)."""
    match method:
        case "full":
            return Kept(attention=True, feed_forward=True, head=True, norms=True)
        case "lora" | "qlora":
            names = options["target_modules"]
            everything = names == "all-linear"
            attention = everything or names is None or bool(ATTENTION_NAMES & set(names))
            return Kept(
                attention=attention,
                feed_forward=everything or (names is not None and bool(set(names) - ATTENTION_NAMES)),
                rank=options["r"],
                # PEFT clones what a 4-bit layer gives; tasks/lm/lora.py adds in place, where it is at work
                copies=2 if method == "qlora" else int(options["dropout"] > 0 or on.mixed),
                dropout=options["dropout"],
                encoder=options.get("encoder", True),
            )
        case "ia3":
            return Kept(scaled=True)
        case "bitfit":
            return Kept(norms=any("norm" in part for part in options["parameters"]))
        case "prefix_tuning":
            return Kept(encoder=False, virtual=options["virtual_tokens"])
    return Kept(virtual=options["virtual_tokens"])


def activations(shape: Shape, of: Kept, rows: int, prompt: int, response: int, on: Target = CPU) -> float:
    """Bytes that are kept for the backward pass of `rows` examples. Without logits and copies of weights."""
    ahead = of.virtual if of.encoder else 0  # virtual tokens with states of their own, or keys and values alone
    last = FLOAT * shape.width * (1 + of.norms)  # of the norm behind the last layer
    head = on.width * response * shape.width * of.head
    if not shape.is_encoder_decoder:
        tokens = prompt + response + ahead
        layer = _attention(shape, of, tokens, prompt + response + of.virtual, on)
        layer += _feed_forward(shape, of, tokens, on)
        return rows * (shape.decoder_layers * layer + tokens * last + head)
    asked = prompt + ahead
    encoder = _attention(shape, of, asked, asked, on) + _feed_forward(shape, of, asked, on)
    decoder = _attention(shape, of, response, response + of.virtual - ahead, on)
    decoder += _attention(shape, of, response, asked, on, crossed=True) + _feed_forward(shape, of, response, on)
    read = asked * last  # what the encoder made of the prompt
    if not on.mixed:
        read += asked * FLOAT * shape.width * of.attention  # for all layers of the decoder
    found = shape.decoder_layers * decoder + response * last + head
    return rows * (found + (shape.encoder_layers * encoder + read if of.encoder else 0))


def _attention(shape: Shape, of: Kept, queries: int, keys: int, on: Target, crossed: bool = False) -> float:
    """Bytes kept for one row: inputs of the norm and of the layers behind it, queries, keys, values, result.

    T5 adds its position bias to the mask of padding, a matrix for each head and row; scores take the same room.
    Where heads share keys and values, these are copied for each behind a mask, and in float32 on a GPU
    (tasks/lm/attention.py).
    """
    copied = on.padded or (on.gpu and not on.mixed)
    key_width = shape.inner if copied else shape.keys
    found: float = queries * FLOAT * shape.width * (1 + of.norms)
    if of.attention:
        readers = 1 if crossed or not on.mixed else 3
        found += on.width * readers * queries * shape.width
        if on.mixed:
            found += on.width * (2 * keys * shape.width if crossed else 0)
            found += on.width * (queries * shape.inner if of.rank else 0)  # the adapter of the output
    found += on.width * (queries * 2 * shape.inner + keys * 2 * key_width)
    found += on.width * 2 * of.rank * of.attention * (queries + keys)
    if of.scaled:
        found += FLOAT * keys * 2 * shape.keys
    if shape.is_encoder_decoder and on.padded:
        found += on.width * shape.heads * queries * keys
    if of.dropout and of.attention:  # each adapted layer drops; in float32 it keeps a copy of its own
        read = queries * (shape.width + shape.inner) + 2 * (keys if crossed else queries) * shape.width
        found += read if on.mixed else (1 + FLOAT) * read - FLOAT * queries * shape.width
    if shape.dropout:
        scores = 0 if on.gpu else (1 + FLOAT) * shape.heads * queries * keys
        found += queries * shape.width + scores
    return found


def _feed_forward(shape: Shape, of: Kept, tokens: int, on: Target) -> float:
    """Bytes kept for one row: the norm's input, the activation's, and the factors of a gate."""
    factors = 2 if shape.gated else 0
    readers = max(factors, 1) if on.mixed else 1
    inside = KEPT_BY_ACTIVATION.get(shape.activation, 1) + factors
    if on.mixed and shape.activation == "gelu_new":
        inside += 2  # its third power is taken in float32
    if of.feed_forward or shape.activation == "relu":
        inside += 1
    found: float = FLOAT * shape.width * (1 + of.norms)
    found += on.width * (readers * shape.width * of.feed_forward + inside * shape.feed_forward)
    found += on.width * of.rank * of.feed_forward * (3 if shape.gated else 2)
    if of.scaled:
        found += FLOAT * shape.feed_forward
    if of.dropout and of.feed_forward:
        read = max(factors, 1) * shape.width + shape.feed_forward
        found += read if on.mixed else (1 + FLOAT) * read - FLOAT * shape.width
    if shape.dropout:
        found += shape.width + shape.feed_forward
    return tokens * found


def copies(shape: Shape, of: Kept) -> float:
    """Bytes of the copies of weights that mixed precision computes with: of linear layers and of the head.

    An encoder that keeps nothing for a backward pass does not keep these either.
    """
    layer = shape.attention + (3 if shape.gated else 2) * shape.width * shape.feed_forward
    kept_by = shape.linear - (0 if of.encoder else shape.encoder_layers * layer)
    return HALF * (kept_by + shape.vocabulary * shape.width)


def updates(shape: Shape, of: Kept, rows: int, prompt: int, response: int, width: float = FLOAT) -> float:
    """Bytes of what LoRA adds to the outputs of its layers, and of their copies.

    Each lives for a moment only, but the narrow states that LoRA keeps are put where it was, and nothing
    else of its size fits there until the backward pass is over.
    """

    def attention(queries: int, keys: int) -> int:
        return of.copies * of.attention * (queries * (shape.inner + shape.width) + keys * 2 * shape.keys)

    def feed_forward(tokens: int) -> int:
        outputs = (2 if shape.gated else 1) * shape.feed_forward + shape.width
        return of.copies * of.feed_forward * tokens * outputs

    if not shape.is_encoder_decoder:
        tokens = prompt + response
        return rows * width * shape.decoder_layers * (attention(tokens, tokens) + feed_forward(tokens))
    decoder = attention(response, response) + attention(response, prompt) + feed_forward(response)
    encoder = of.encoder * (attention(prompt, prompt) + feed_forward(prompt))
    return rows * width * (shape.decoder_layers * decoder + shape.encoder_layers * encoder)


def unpacked(shape: Shape) -> float:
    """Bytes of one layer's 4-bit weights while they are unpacked: an index of 8 bytes, and the value twice."""
    return (8 + 2 * FLOAT) * shape.width * max(shape.feed_forward, shape.inner)


def logits(shape: Shape, rows: int, response: int, copies: int) -> float:
    """Bytes of float32 logits of the response tokens."""
    extra = 0 if shape.is_encoder_decoder else 1  # causal models compute one more position
    return FLOAT * copies * rows * (response + extra) * shape.vocabulary


def cache(shape: Shape, rows: int, prompt: int, response: int, width: float = FLOAT) -> float:
    """Bytes of the keys and values of `rows` answers: 2 · layers · width of the keys, for each token."""
    return rows * (prompt + response) * 2 * shape.decoder_layers * shape.keys * width


def forward(shape: Shape, rows: int, prompt: int, width: float = FLOAT) -> float:
    """Bytes of the largest layer of a forward pass without gradients: its states, and the gate's factors; of T5
    also the position bias, a matrix for each head and row.
    """
    bias = shape.heads * prompt if shape.is_encoder_decoder else 0
    return rows * prompt * (4 * shape.width + 3 * shape.feed_forward + bias) * width


def trained_state(trained: int) -> dict[str, float]:
    """Gradients and optimizer of what is trained."""
    return {"gradients": FLOAT * trained, "optimizer": ADAM * trained}


def sharded(parts: Mapping[str, float], strategy: str, devices: int) -> dict[str, float]:
    """What one of `devices` holds of weights, gradients and optimizer (Rajbhandari et al. 2020, 1910.02054 §5).

    `ddp` keeps everything everywhere; ZeRO-1 divides the optimizer, ZeRO-2 the gradients too, ZeRO-3 and FSDP
    also the weights, and those gather a layer's in bf16 when it is its turn, so that no copy is kept.
    Activations belong to a device's own examples.
    """
    divided = {
        "ddp": (),
        "zero1": ("optimizer",),
        "zero2": ("optimizer", "gradients"),
        "zero3": ("optimizer", "gradients", "weights"),
        "fsdp": ("optimizer", "gradients", "weights"),
    }[strategy]
    found = {name: size / devices if name in divided else size for name, size in parts.items()}
    if "weights" in divided:
        found.pop(COPIES, None)
    return found
