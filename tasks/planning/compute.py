"""Floating-point operations, and what follows from them: time, and whether the text is enough for the model."""

from tasks.planning.shape import Shape

TOKENS_PER_PARAMETER = 20  # compute-optimal training (Hoffmann et al. 2022, 2203.15556, table 3)


def training_flops(parameters: float, tokens: float) -> float:
    """C = 6·N·D of pretraining (Kaplan et al. 2020, 2001.08361 §2.1): 2 forward, 4 backward."""
    return 6 * parameters * tokens


def enough_tokens(parameters: float) -> float:
    """The tokens that are worth reading for a model of this size."""
    return TOKENS_PER_PARAMETER * parameters


def forward_flops(shape: Shape, prompt: int, response: int) -> float:
    """Operations of one forward pass over one example.

    2 for each weight and token that meet, 4 · width for each pair of tokens of which one attends to the other;
    the head reads response tokens alone.
    """
    feed_forward = (3 if shape.gated else 2) * shape.width * shape.feed_forward
    head = shape.vocabulary * shape.width * response
    if not shape.is_encoder_decoder:
        tokens = prompt + response
        layers = tokens * (shape.attention + feed_forward) + 2 * shape.inner * tokens**2
        return 2 * (shape.decoder_layers * layers + head)
    encoder = prompt * (shape.attention + feed_forward) + 2 * shape.inner * prompt**2
    crossed = 2 * shape.width * (response * shape.inner + prompt * shape.keys)
    decoder = response * (shape.attention + feed_forward) + crossed
    decoder += 2 * shape.inner * response * (response + prompt)
    return 2 * (shape.encoder_layers * encoder + shape.decoder_layers * decoder + head)


def passes(everything_is_trained: bool) -> int:
    """Forward passes that a training step costs: the backward pass costs two, or one where no gradients of the
    weights are taken.
    """
    return 3 if everything_is_trained else 2
