"""A model and its tokenizer made here: T5- or Llama-style, of any size, with BPE learnt from a corpus."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.t5.modeling_t5 import T5Attention

from tasks.lm.architecture import Architecture
from tasks.lm.model import LanguageModel

PAD, END, START = "<pad>", "</s>", "<s>"
# How heads of an encoder begin: what a token loses with distance, and what for being ahead; at most so much.
SLOPES, NOT_AHEAD, FARTHEST = (0.5, 0.25, 0.125, 0.0), 5.0, 8.0
# How heads of a Llama's first layer begin: the logit of the token itself, which falls with distance.
NEAREST = (16.0, 8.0, 4.0, 0.0)


def build(architecture: Architecture, texts: Iterable[str], sentinels: int) -> LanguageModel:
    """A model with random weights (from torch's generator) and a tokenizer learnt from `texts`, on the CPU.

    A T5 vocabulary holds `sentinels` tokens `<extra_id_0>` … for span corruption.
    """
    tokenizer = train_tokenizer(architecture, texts, sentinels)
    config = _t5(architecture, tokenizer) if architecture.family == "t5" else _llama(architecture, tokenizer)
    model = with_random_weights(config)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    starts: dict[str, Any] = (
        {"decoder_start_token_id": tokenizer.pad_token_id}
        if architecture.family == "t5"
        else {"bos_token_id": tokenizer.bos_token_id}
    )
    model.generation_config = GenerationConfig(**ids, **starts)
    return LanguageModel(model.eval(), tokenizer)


def train_tokenizer(
    architecture: Architecture, texts: Iterable[str], sentinels: int
) -> PreTrainedTokenizerFast:
    """Byte-level BPE (Sennrich et al. 2016, 1508.07909): no text is unknown, digits stay single.

    A word has the same tokens at the start of a line as after a space, which spares a small model learning each
    word twice. T5 ends every text with the end token, Llama begins it with the start token.
    """
    seq2seq = architecture.family == "t5"
    special = [PAD, END, *([f"<extra_id_{i}>" for i in range(sentinels)] if seq2seq else [START])]
    tokenizer = Tokenizer(models.BPE())
    # A space before a word that starts the text (made a line for the moment) or a line. The pattern takes
    # the line end with it: a pattern of no width makes tokenizers fail.
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Prepend("\n"),
            normalizers.Replace(Regex(r"\n(?=\w)"), "\n "),
            normalizers.Replace(Regex(r"\A\n"), ""),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("\n ", "\n"), decoders.Strip(" ", 1, 0)]
    )
    trainer = BpeTrainer(
        vocab_size=architecture.vocabulary - len(architecture.added_tokens),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_without(architecture.added_tokens, texts), trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in architecture.added_tokens])
    template, token = (f"$A {END}", END) if seq2seq else (f"{START} $A", START)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, tokenizer.token_to_id(token))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        bos_token=None if seq2seq else START,
        padding_side="right" if seq2seq else "left",
        clean_up_tokenization_spaces=False,
    )


def _without(tokens: Sequence[str], texts: Iterable[str]) -> Iterable[str]:
    """The texts between added tokens: no merges are spent on what is one token anyway."""
    if not tokens:
        return texts
    pattern = re.compile("|".join(map(re.escape, tokens)))
    return (part for text in texts for part in pattern.split(text))


def with_random_weights(config: PretrainedConfig) -> PreTrainedModel:
    """A language model of any size with random weights (from torch's generator), on the CPU.

    T5 and Llama begin as those of `build` do, others as transformers begins them.
    """
    match config.model_type:
        case "t5":
            model = T5ForConditionalGeneration(config)
            _favour_near(model.encoder.block[0].layer[0].SelfAttention)
        case "llama":
            model = LlamaForCausalLM(config)
            if config.attention_bias:
                _look_back_near(model.model.layers[0].self_attn)
        case _:
            family = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            model = family.from_config(config)
    return model


def _t5(architecture: Architecture, tokenizer: PreTrainedTokenizerFast) -> T5Config:
    """T5 1.1 (gated SiLU), but with the tied and scaled embeddings of the first T5."""
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=architecture.d_model,
        d_kv=architecture.d_model // architecture.heads,
        d_ff=architecture.d_ff,
        num_layers=architecture.layers,
        num_heads=architecture.heads,
        dropout_rate=architecture.dropout,
        feed_forward_proj="gated-silu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )


def _favour_near(attention: T5Attention) -> None:
    """Start the encoder's relative position bias with a slope, as ALiBi has it (Press et al., 2108.12409).

    Every other head looks back only. From T5's own start, near zero, a small model takes thousands of steps to
    find out that the last name before some words tells who said them.
    """
    reach = attention.relative_attention_max_distance
    distances = torch.arange(-reach, reach + 1)  # of the token that is read from the one that reads
    buckets = attention._relative_position_bucket(
        distances, num_buckets=attention.relative_attention_num_buckets, max_distance=reach
    )
    weight = attention.relative_attention_bias.weight  # [buckets, heads]
    with torch.no_grad():
        for bucket in buckets.unique():
            distance = distances[buckets == bucket].float().mean()
            for head in range(attention.n_heads):
                ahead = NOT_AHEAD if head % 2 == 0 and distance > 0 else 0.0
                weight[bucket, head] = max(-SLOPES[head % len(SLOPES)] * abs(distance) - ahead, -FARTHEST)


def _llama(architecture: Architecture, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Llama with tied embeddings, and weights of variance 1 / width, larger than those of large models.

    In a narrow model the usual 0.02 leaves attention next to uniform for hundreds of steps.
    """
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=architecture.d_model,
        intermediate_size=architecture.d_ff,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        attention_dropout=architecture.dropout,
        attention_bias=True,
        max_position_embeddings=architecture.positions,
        initializer_range=architecture.d_model**-0.5,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )


def _look_back_near(attention: LlamaAttention) -> None:
    """Start a layer's queries and keys with a part that is the same for all tokens.

    Rotated by position (RoPE, Su et al., 2104.09864 §3.4.3) it gives a logit that falls with distance, much as
    the slopes of ALiBi do (Press et al., 2108.12409), and that training may change. The slowest quarter of
    the rotations hardly tells near from far and is left out.
    """
    size = attention.head_dim
    rotations = math.ceil(size * 3 / 8)  # of size / 2, the fastest first
    with torch.no_grad():
        for projection in (attention.q_proj, attention.k_proj):
            for head, bias in enumerate(projection.bias.view(-1, size)):
                logit = NEAREST[head % len(NEAREST)]
                bias[:rotations] = (logit * size**0.5 / rotations) ** 0.5
