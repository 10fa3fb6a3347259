"""A text classifier with its tokenizer; with one output it is a reward model of prompts and answers.

How the two are read depends on the family, and is what `AutoModelForSequenceClassification` computes when it is
called the same way:

- seq2seq: the prompt in the encoder, the answer in the decoder, scored at the answer's end token. A T5 reads
  all answers to one prompt side by side in one row of the decoder, none of which sees another: its positions
  are relative, so it does not matter where an answer stands. transformers' T5 looks for the end token in the
  columns of `input_ids`, so a plain call pads prompt and answer on the left to one width;
- causal: prompt and answer as one sequence, scored at its last token. Where positions are rotary and attention
  is whole in all layers, all answers to one prompt stand behind it in one row, each as if it were alone there;
- encoder only (BERT and the like): prompt and answer as a pair of texts.

To that, a reward model of either language-model family may add the mean log-likelihood of the answer's tokens,
times a fixed weight, read from the classifier's own states with the head of the model that it grew from.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging
from transformers.utils.logging import disable_progress_bar

from tasks.lm.attention import on_device
from tasks.lm.collate import batches_by_length, encode_prompts, encode_responses
from tasks.lm.device import device, precision
from tasks.lm.language_head import LanguageHead, head_of, load_head
from tasks.lm.model import ADAPTER_CONFIG, LanguageModel, is_adapter, load
from tasks.stage import Compute, ParamsError, UserError
from tasks.stage.files import new_folder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Ids = Sequence[int]
OF_PROMPT, OF_PADDING = -2, -1  # in the place of an answer's number


@dataclass(frozen=True)
class Text:
    """Token ids of a prompt and of an answer; for an encoder, both stand in `answer` and `kinds` tells them
    apart.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    kinds: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


class Reading(NamedTuple):
    """What a reward model makes of N texts; each `[N]`, float32."""

    scores: Tensor  # before the shift
    logprobs: Tensor | None  # the mean log-likelihood of each answer's tokens; None: not read


@dataclass(frozen=True)
class Classifier:
    """A sequence classifier. What is longer than the limits (null: none) is cut."""

    model: "PreTrainedModel | PeftModel"
    tokenizer: "PreTrainedTokenizerBase"
    shift: float = 0.0  # subtracted from the only output of a reward model; 0 where the head's bias holds it
    max_prompt_tokens: int | None = None
    max_answer_tokens: int | None = None
    likelihood: float = 0.0  # weight of the mean log-likelihood of the answer in the only output
    language_head: LanguageHead | None = None  # what reads it, where the weight is not 0

    @property
    def bare(self) -> "PreTrainedModel":
        """The model with its head, out of its adapter's wrapper."""
        return self.model.get_base_model() if is_adapter(self._lm) else self.model

    @property
    def family(self) -> str:
        """`seq2seq`, `causal` or `encoder`."""
        if self.model.config.is_encoder_decoder:
            return "seq2seq"
        return "causal" if hasattr(self.bare, "score") else "encoder"

    @property
    def parameters(self) -> int:
        """How many numbers the model consists of, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def trainable_parameters(self) -> int:
        """How many of them training changes."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def with_limits(self, max_prompt_tokens: int | None, max_answer_tokens: int | None) -> Self:
        """The same classifier with these limits."""
        return replace(self, max_prompt_tokens=max_prompt_tokens, max_answer_tokens=max_answer_tokens)

    def shifted(self, by: float) -> Self:
        """The same classifier with scores lower by `by`: in its head's bias, where it has one (in place)."""
        bias: nn.Parameter | None = output_layer(self.bare).bias
        if bias is None:
            return replace(self, shift=self.shift + by)
        bias.data.sub_(by)
        return self

    def encode(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Text]:
        """Token ids of each prompt with its answer. A long prompt loses its middle, a long answer its end.

        An encoder cuts the longer of the two.
        """
        if self.family == "encoder":
            return self._encode_pairs(prompts, answers)
        unique = list(dict.fromkeys(prompts))
        encoded = dict(zip(unique, encode_prompts(self._lm, unique, self.max_prompt_tokens), strict=True))
        responses = encode_responses(self._lm, answers, self.max_answer_tokens)
        return [
            Text(tuple(encoded[prompt]), tuple(ids)) for prompt, ids in zip(prompts, responses, strict=True)
        ]

    def collate(self, texts: Sequence[Text]) -> dict[str, Tensor]:
        """A batch of N texts on the CPU, as `read` takes it."""
        match self.family:
            case "seq2seq":
                return self._collate_seq2seq(texts)
            case "causal":
                return self._collate_causal(texts)
        ids, mask = self._pad([text.answer for text in texts])
        kinds, _ = self._pad([text.kinds for text in texts], 0)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            **({"token_type_ids": kinds} if kinds.shape[1] else {}),
        }

    def read(self, batch: Mapping[str, Tensor]) -> Reading:
        """The only output of a reward model, and what its language head tells of the answers."""
        model = self.bare
        match self.family:
            case "seq2seq":
                hidden = model.base_model(
                    batch["prompt_ids"],
                    attention_mask=batch["prompt_mask"],
                    decoder_input_ids=batch["answer_ids"],
                    decoder_attention_mask=_within(batch["answer_of"], model.dtype),
                    use_cache=False,
                ).last_hidden_state
                found = model.classification_head(hidden[batch["row"], batch["end"]])
            case "causal":
                alone = "mask" in batch
                seen = batch["mask"] if alone else _within(batch["answer_of"], model.dtype)
                counted = {} if alone else {"position_ids": batch["positions"]}
                hidden = model.base_model(
                    batch["answer_ids"], attention_mask=seen, use_cache=False, **counted
                ).last_hidden_state
                found = model.score(hidden[batch["row"], batch["end"]])
            case _:
                return Reading(model(**batch).logits[:, 0].float(), None)
        scores: Tensor = found[:, 0].float()
        if self.language_head is None:
            return Reading(scores, None)
        logprobs = self._logprobs(self.language_head, hidden, batch)
        return Reading(scores + self.likelihood * logprobs, logprobs)

    def _logprobs(self, head: LanguageHead, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """The mean log-likelihood of each answer, `[N]`, from the last states `[R, L, D]`."""
        length, row = batch["length"], batch["row"][:, None]
        step = torch.arange(int(length.max()), device=hidden.device)
        mask = step < length[:, None]
        at = ((batch["end"] - length)[:, None] + step) * mask  # of the token before
        read = torch.cat((batch["before"][:, None], at[:, 1:]), dim=1)
        return head.mean_logprob(hidden[row, read], batch["answer_ids"][row, at + 1], mask)

    @property
    def _shares_prompts(self) -> bool:
        """Whether several answers to a prompt can be read beside one another."""
        config = self.model.config
        if self.family == "seq2seq":
            return hasattr(config, "relative_attention_num_buckets")
        kinds = getattr(config, "layer_types", None) or ["full_attention"]
        windowed = getattr(config, "sliding_window", None) is not None
        return hasattr(config, "rope_parameters") and not windowed and set(kinds) == {"full_attention"}

    @property
    def _lm(self) -> LanguageModel:
        return LanguageModel(self.model, self.tokenizer)

    def _encode_pairs(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Text]:
        limits = (self.max_prompt_tokens, self.max_answer_tokens)
        longest = longest_text(self)
        if None not in limits:
            longest = min(longest, sum(limit for limit in limits if limit is not None))
        encoded = self.tokenizer(
            list(prompts), list(answers), truncation=True, max_length=longest, verbose=False
        )
        kinds = encoded.get("token_type_ids", [()] * len(prompts))
        return [
            Text((), tuple(ids), tuple(kind)) for ids, kind in zip(encoded["input_ids"], kinds, strict=True)
        ]

    def _collate_causal(self, texts: Sequence[Text]) -> dict[str, Tensor]:
        if not self._shares_prompts:
            ids, mask = self._pad([text.prompt + text.answer for text in texts])
            return {
                "answer_ids": ids,
                "mask": mask,
                "row": torch.arange(len(texts)),
                "end": mask.sum(dim=1) - 1,
                **_lengths(texts, [len(text.prompt) - 1 for text in texts]),
            }
        rows: dict[Ids, int] = {}
        ids_of: list[list[int]] = []
        answer_of: list[list[int]] = []
        positions: list[list[int]] = []
        places = []
        for number, text in enumerate(texts):
            row = rows.setdefault(text.prompt, len(rows))
            read = len(text.prompt)
            if row == len(ids_of):
                ids_of.append([*text.prompt])
                answer_of.append([OF_PROMPT] * read)
                positions.append([*range(read)])
            ids_of[row] += text.answer
            answer_of[row] += [number] * len(text.answer)
            positions[row] += range(read, read + len(text.answer))
            places.append((row, len(ids_of[row]) - 1))
        return {
            "answer_ids": self._pad(ids_of)[0],
            "answer_of": self._pad(answer_of, OF_PADDING)[0],
            "positions": self._pad(positions, 0)[0],
            "row": torch.tensor([row for row, _ in places]),
            "end": torch.tensor([end for _, end in places]),
            **_lengths(texts, [len(text.prompt) - 1 for text in texts]),
        }

    def _collate_seq2seq(self, texts: Sequence[Text]) -> dict[str, Tensor]:
        shared = self._shares_prompts
        start = self.model.config.decoder_start_token_id
        rows: dict[tuple[Ids, int], int] = {}
        answers: list[list[int]] = []
        answer_of: list[list[int]] = []
        places = []
        for number, text in enumerate(texts):
            row = rows.setdefault((text.prompt, 0 if shared else number), len(rows))
            if row == len(answers):
                answers.append([])
                answer_of.append([])
            answers[row] += [start, *text.answer]
            answer_of[row] += [number] * (1 + len(text.answer))
            places.append((row, len(answers[row]) - 1))
        prompt_ids, prompt_mask = self._pad([prompt for prompt, _ in rows])
        return {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "answer_ids": self._pad(answers)[0],
            "answer_of": self._pad(answer_of, OF_PADDING)[0],
            "row": torch.tensor([row for row, _ in places]),
            "end": torch.tensor([end for _, end in places]),
            **_lengths(texts, [end - len(text.answer) for text, (_, end) in zip(texts, places, strict=True)]),
        }

    def _pad(self, rows: Sequence[Ids], value: int | None = None) -> tuple[Tensor, Tensor]:
        """Ids and mask `[N, longest row]`, padded on the right."""
        width = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id if value is None else value
        ids = [[*row, *[pad] * (width - len(row))] for row in rows]
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        return torch.tensor(ids, dtype=torch.int64), torch.tensor(mask, dtype=torch.int64)


def new_classifier(
    folder_or_id: str | Path, compute: Compute, revision: str | None = None, likelihood: float = 0.0
) -> Classifier:
    """A classifier with one output on the weights of a language model (adapters merged) or an encoder.

    The new head comes from torch's generator, its last layer with the standard deviation 1/√(d + 1) of
    Huang et al. 2024 (2403.17031 §3). Float32, to be trained. Raises UserError when the model cannot be opened,
    and ParamsError when an encoder should tell a likelihood.
    """
    if (Path(folder_or_id) / ADAPTER_CONFIG).is_file():
        model, tokenizer = _on_merged(folder_or_id, compute)
    else:
        tokenizer = _tokenizer(folder_or_id, revision)
        config = _config(folder_or_id, revision)
        config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
        model = _open(folder_or_id, revision, config=config, dtype=torch.float32, ignore_mismatched_sizes=True)
    output = output_layer(model)
    with torch.no_grad():
        output.weight.normal_(std=(output.in_features + 1) ** -0.5)
        if output.bias is not None:
            output.bias.zero_()
    found = Classifier(on_device(model, compute), tokenizer)
    if not likelihood:
        return found
    if found.family == "encoder":
        raise ParamsError(f"likelihood {likelihood}: the encoder {folder_or_id} tells none; set it to 0")
    start = load(folder_or_id, compute, revision, trainable=True)
    return replace(found, likelihood=likelihood, language_head=head_of(start))


def with_lora(classifier: Classifier, options: Mapping[str, Any]) -> Classifier:
    """The classifier with a LoRA adapter; its head is trained too.

    `options` are `r`, `alpha`, `dropout` and `target_modules`, as of a language model. Raises ParamsError when
    the modules do not fit the model.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=options["r"],
        lora_alpha=options["alpha"],
        lora_dropout=options["dropout"],
        target_modules=options["target_modules"],
        modules_to_save=heads(classifier.bare),
    )
    try:
        return replace(classifier, model=get_peft_model(classifier.bare, config))
    except ValueError as error:
        model_type, wanted = classifier.model.config.model_type, options["target_modules"]
        raise ParamsError(
            f"lora on {model_type} with target_modules {wanted}: {str(error).splitlines()[0]}"
        ) from error


def load_classifier(folder_or_id: str | Path, compute: Compute, revision: str | None = None) -> Classifier:
    """Open a classifier that answers: a reward model of this project, or any other by folder or hub id.

    Raises UserError when there is none or it has no head.
    """
    config = _config(folder_or_id, revision)
    tokenizer = _tokenizer(folder_or_id, revision)
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    model = _open(folder_or_id, revision, config=config, dtype=precision(compute), whole=True)
    likelihood = getattr(config, "reward_likelihood", 0.0)
    return Classifier(
        on_device(model, compute).eval(),
        tokenizer,
        getattr(config, "reward_shift", 0.0),
        getattr(config, "reward_max_prompt_tokens", None),
        getattr(config, "reward_max_answer_tokens", None),
        likelihood,
        load_head(Path(folder_or_id), device(compute)) if likelihood else None,
    )


def save_classifier(classifier: Classifier, folder: Path) -> None:
    """Write the classifier as a plain folder with shift, limits and the weight of the likelihood in its
    config.json, and the language-model head beside it, all or nothing.

    A LoRA adapter is merged into the weights, in place: an adapter saved by itself can lose its head.
    """
    disable_progress_bar()
    model = classifier.model
    if is_adapter(LanguageModel(model, classifier.tokenizer)):
        model = model.merge_and_unload()
    model.config.reward_shift = classifier.shift
    model.config.reward_max_prompt_tokens = classifier.max_prompt_tokens
    model.config.reward_max_answer_tokens = classifier.max_answer_tokens
    model.config.reward_likelihood = classifier.likelihood
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        classifier.tokenizer.save_pretrained(temporary)
        if classifier.language_head is not None:
            classifier.language_head.save(temporary)


def scores(
    classifier: Classifier,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    batch_size: int,
    label: str | None = None,
) -> list[float]:
    """What each answer to its prompt is worth, in the order given.

    Without `label`: the only output of a reward model, shift applied. With it: the logit of that label for
    the answer alone, which is what classifiers of toxicity or sentiment were trained on. Raises ParamsError
    when the classifier has no such label, or several outputs and none was named.
    """
    outputs = classifier.model.config.num_labels
    if label is None and outputs != 1:
        raise ParamsError(f"the classifier has {outputs} outputs: name one as label, {_labels(classifier)}")
    column = None if label is None else _column(classifier, label)
    texts = classifier.encode(prompts, answers) if column is None else _encode_alone(classifier, answers)
    found = [0.0] * len(texts)
    with torch.inference_mode():
        for rows in batches_by_length([len(text) for text in texts], batch_size):
            chosen = [texts[row] for row in rows]
            values = (
                classifier.read(_moved(classifier, classifier.collate(chosen))).scores - classifier.shift
                if column is None
                else _logits_alone(classifier, chosen)[:, column].float()
            )
            for row, value in zip(rows, values.tolist(), strict=True):
                found[row] = value
    return found


def output_layer(model: "PreTrainedModel") -> nn.Linear:
    """The layer that gives the outputs."""
    layers = [
        layer
        for name in heads(model)
        for layer in model.get_submodule(name).modules()
        if isinstance(layer, nn.Linear)
    ]
    return layers[-1]


def heads(model: "PreTrainedModel") -> list[str]:
    """Names of the parts of a classifier that its base model has not."""
    return [
        name
        for name, part in model.named_children()
        if part is not model.base_model and next(part.parameters(), None) is not None
    ]


def longest_text(classifier: Classifier) -> int:
    """How many tokens the classifier can read."""
    positions: int = getattr(
        classifier.model.config, "max_position_embeddings", classifier.tokenizer.model_max_length
    )
    return int(min(positions, classifier.tokenizer.model_max_length))


def _lengths(texts: Sequence[Text], before: Sequence[int]) -> dict[str, Tensor]:
    """How long each answer is, and where in its row the state is that its first token is told from."""
    return {"length": torch.tensor([len(text.answer) for text in texts]), "before": torch.tensor(before)}


def _within(answer_of: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention `[R, 1, L, L]`: a token sees those of its own answer `[R, L]` up to itself,
    and those of a prompt that stands before it.
    """
    own, theirs = answer_of[:, :, None], answer_of[:, None, :]
    seen = ((own == theirs) | (theirs == OF_PROMPT)).tril()
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[
        :, None
    ]


def _moved(classifier: Classifier, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(classifier.model.device) for name, tensor in batch.items()}


def _encode_alone(classifier: Classifier, answers: Sequence[str]) -> list[Text]:
    encoded = classifier.tokenizer(
        list(answers), truncation=True, max_length=longest_text(classifier), verbose=False
    )
    return [Text((), tuple(ids)) for ids in encoded["input_ids"]]


def _logits_alone(classifier: Classifier, texts: Sequence[Text]) -> Tensor:
    ids, mask = classifier._pad([text.answer for text in texts])
    found: Tensor = classifier.model(**_moved(classifier, {"input_ids": ids, "attention_mask": mask})).logits
    return found


def _labels(classifier: Classifier) -> str:
    return " or ".join(classifier.model.config.id2label.values())


def _column(classifier: Classifier, label: str) -> int:
    columns = {name: number for number, name in classifier.model.config.id2label.items()}
    if label not in columns:
        raise ParamsError(f"the classifier has no label {label}; it has {_labels(classifier)}")
    return int(columns[label])


def _config(folder_or_id: str | Path, revision: str | None) -> "PretrainedConfig":
    try:
        return AutoConfig.from_pretrained(folder_or_id, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _unreadable(folder_or_id, error) from error


def _tokenizer(folder_or_id: str | Path, revision: str | None) -> "PreTrainedTokenizerBase":
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder_or_id, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _unreadable(folder_or_id, error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _open(
    folder_or_id: str | Path, revision: str | None, whole: bool = False, **options: Any
) -> "PreTrainedModel":
    disable_progress_bar()
    said = logging.get_verbosity()
    logging.set_verbosity_error()  # a head that is missing, or left over, is what is wanted here
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder_or_id,
            revision=revision,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError) as error:
        raise _unreadable(folder_or_id, error) from error
    finally:
        logging.set_verbosity(said)
    if whole and report["missing_keys"]:
        raise UserError(f"{folder_or_id} is no classifier: it has no {sorted(report['missing_keys'])[0]}")
    return model


def _on_merged(folder: str | Path, compute: Compute) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A classifier with a new head on a language model whose adapter is merged in."""
    from tasks.lm.peft import merged

    lm = merged(load(folder, compute, trainable=True))
    config = copy.deepcopy(lm.model.config)
    config.num_labels = 1
    config.pad_token_id = lm.tokenizer.pad_token_id
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    weights = lm.model.base_model.state_dict()
    kept = {name: weights[name] for name in model.base_model.state_dict()}  # all but the language-model head
    model.base_model.load_state_dict(kept)
    return model, lm.tokenizer


def _unreadable(folder_or_id: str | Path, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0]
    return UserError(f"cannot open the classifier {folder_or_id} (a local folder or a hub id): {reason}")
