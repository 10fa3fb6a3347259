"""The page: prompt, variants and settings, then the answers, and the distribution of any of their tokens."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import gradio as gr

from tasks.playground import picture
from tasks.playground.answering import Answer, Playground, check_prompt
from tasks.playground.distribution import rows
from tasks.playground.settings import SETTINGS, STRATEGIES, Setting, Settings, check, first_values
from tasks.stage import UserError

TEMPLATES = ("as evaluated", "zero-shot", "one-shot", "few-shot")
CHOSEN = ("finetune", "ppo")  # what is asked at first, where it is there
ON_CLICK = """
element.addEventListener('click', event => {
  const token = event.target.closest('[data-at]');
  if (token) trigger('click', {at: Number(token.dataset.at)});
});
"""
INTRO = (
    "Ask several models the same thing, change how they choose their words, and see the probabilities "
    "that they choose by."
)
Answers = dict[str, Answer | str]


class First(NamedTuple):
    """What stands in the page when it opens."""

    prompt: str
    reference: str


def build(playground: Playground) -> gr.Blocks:
    """The page over `playground`."""
    strategy, values = first_values(playground.params.generation)
    names = list(playground.variants)
    tasks, first = _first(playground)
    with gr.Blocks(title="LLM lifecycle: try the models", analytics_enabled=False) as page:
        given, number, position = gr.State({}), gr.State(0), gr.State(0)
        gr.HTML(f'<h1>Try the models</h1><p class="quiet">{INTRO}</p>', elem_classes="page")
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                task = gr.Dropdown(tasks, value=tasks[0], label="Task", info=_TASK)
                prompt = gr.Textbox(first.prompt, label="Prompt", lines=9, max_lines=18, elem_id="prompt")
                reference = gr.Textbox(
                    first.reference,
                    label="Reference",
                    info="What the example says is right",
                    interactive=False,
                    lines=1,
                    elem_id="reference",
                )
                variants = gr.CheckboxGroup(
                    names,
                    value=[name for name in CHOSEN if name in names] or names[:2],
                    label="Variants",
                    elem_id="variants",
                )
                template = gr.Radio(
                    TEMPLATES, value=TEMPLATES[0], label="Worked examples", info=_info(playground)
                )
                with gr.Row():
                    another = gr.Button("Another test example", elem_id="example", min_width=160)
                    ask = gr.Button("Answer", variant="primary", elem_id="answer", min_width=160)
            with gr.Column(scale=2, min_width=320):
                how = gr.Radio(STRATEGIES, value=strategy, label="Decoding", info=_HOW, elem_id="strategy")
                with gr.Row():
                    controls = [_control(setting, values[setting.name], strategy) for setting in SETTINGS]
        trouble = gr.HTML(elem_classes="page", elem_id="trouble")
        answers = gr.HTML(elem_classes="page", elem_id="answers")
        with gr.Column(visible=False, elem_id="tokens") as tokens:
            gr.HTML(f'<h2>What it chose from</h2><p class="quiet">{_TOKENS}</p>', elem_classes="page")
            whose = gr.Radio([], label="Answer of", elem_id="whose")
            with gr.Row():
                back = gr.Button("◂ token before", size="sm", min_width=120)
                on = gr.Button("token after ▸", size="sm", min_width=120, elem_id="after")
            strip = gr.HTML(elem_classes="page", elem_id="strip", js_on_load=ON_CLICK)
            chart = gr.HTML(elem_classes="page", elem_id="chart")

        settings, shown = [how, *controls], [strip, chart]
        looked_at = [given, whose, position, *settings]
        see = _guarded(lambda found, name, at, *asked: _look(playground, found, name, at, asked), 3)

        def follow(*values: Any) -> list[Any]:
            return see(*values)[1:]  # what is wrong was said already

        def answer(
            text: str, of: str, wanted: list[str], shots: str, *asked: Any
        ) -> Iterator[list[Any]]:  # Gradio must see a generator
            yield from _answer(playground, text, of, wanted, shots, asked)

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

        another.click(
            _guarded(lambda wanted, at: _example(playground, wanted, at), 4),
            [task, number],
            [trouble, prompt, reference, number],
            **quiet,
        )
        how.change(
            lambda wanted: [gr.update(visible=_used(s, wanted)) for s in SETTINGS], how, controls, **quiet
        )
        answered = gr.on(
            [ask.click, prompt.submit],
            answer,
            [prompt, task, variants, template, *settings],
            [trouble, answers, given, whose, position, tokens],
            show_progress="hidden",
            concurrency_limit=1,
            api_visibility="private",
        )
        answered.then(follow, looked_at, shown, **quiet)
        for control in settings:
            control.change(see, looked_at, [trouble, *shown], trigger_mode="always_last", **quiet)
        whose.input(lambda: 0, None, position, **quiet).then(follow, looked_at, shown, **quiet)
        for button, by in ((back, -1), (on, 1)):
            moved = button.click(_mover(by), [given, whose, position], position, **quiet)
            moved.then(follow, looked_at, shown, **quiet)
        strip.click(_clicked, None, position, **quiet).then(follow, looked_at, shown, **quiet)
    return page


_TASK = "Of the test example, and of the worked ones"
_HOW = "How a token is chosen from the probabilities"
_TOKENS = (
    "Choose a token of the answer: each column is the distribution over the next token after one more setting. "
    "Change a setting above and watch what it cuts and reshapes; the answer itself stays until you ask again."
)


def _first(playground: Playground) -> tuple[list[str], First]:
    """The tasks of the test examples and the first of these; without examples the page is empty."""
    try:
        tasks = playground.tasks()
        example = playground.example(tasks[0], 0)
    except UserError:
        return [playground.params.task], First("", "")
    return tasks, First(example.prompt, example.reference)


def _info(playground: Playground) -> str:
    return f"How many stand before the prompt: as in the evaluation, none, one, or {playground.few}"


def _used(setting: Setting, strategy: str) -> bool:
    return setting.strategy in (None, strategy)


def _control(setting: Setting, value: float, strategy: str) -> gr.Slider | gr.Number:
    about = {"label": setting.name, "info": setting.what, "elem_id": setting.name, "value": value}
    visible = _used(setting, strategy)
    if setting.step is None:
        return gr.Number(**about, visible=visible, min_width=200)
    return gr.Slider(
        setting.low,
        setting.high,
        step=setting.step,
        visible=visible,
        min_width=200,
        buttons=[],
        **about,
    )


def _checked(asked: Sequence[Any]) -> Settings:
    strategy, *values = asked
    return check(strategy, {s.name: value for s, value in zip(SETTINGS, values, strict=True)})


def _guarded(act: Callable[..., list[Any]], outputs: int) -> Callable[..., list[Any]]:
    """`act`, which fills all outputs; the first is the message, which says what was wrong instead."""

    def guarded(*values: Any) -> list[Any]:
        try:
            return act(*values)
        except UserError as error:
            return [picture.message(str(error)), *[gr.skip()] * (outputs - 1)]

    return guarded


def _example(playground: Playground, task: str, number: int) -> list[Any]:
    example = playground.example(task, number + 1)
    return ["", example.prompt, example.reference, number + 1]


def _answer(
    playground: Playground, prompt: str, task: str, chosen: Sequence[str], template: str, asked: Sequence[Any]
) -> Iterator[list[Any]]:
    """Answers one after another, each shown when it is there."""
    untouched = [gr.skip()] * 5
    try:
        settings = _checked(asked)
        if not chosen:
            raise UserError("no variant is chosen: tick one or more")
        check_prompt(prompt)
    except UserError as error:
        yield [picture.message(str(error)), *untouched]
        return
    found: Answers = {}
    toxic_from = playground.params.toxicity.toxic_from
    names = [name for name in playground.variants if name in chosen]
    for name in names:
        waiting = dict.fromkeys(names) | found
        yield ["", picture.cards(waiting, toxic_from), *untouched[1:]]
        try:
            shots = _shots(playground, name, template)
            found[name] = playground.answer(name, prompt, task, shots, settings)
        except UserError as error:
            found[name] = str(error)
    good = [name for name in names if isinstance(found[name], Answer)]
    yield [
        "",
        picture.cards(found, toxic_from),
        found,
        gr.update(choices=good, value=good[0] if good else None),
        0,
        gr.update(visible=bool(good)),
    ]


def _shots(playground: Playground, variant: str, template: str) -> int:
    counts = (playground.variants[variant].shots, 0, 1, playground.few)
    return dict(zip(TEMPLATES, counts, strict=True))[template]


def _look(playground: Playground, found: Answers, name: str, position: int, asked: Sequence[Any]) -> list[Any]:
    """The tokens of an answer, and the distribution of the one at `position`."""
    settings = _checked(asked)
    answer = found.get(name)
    if not isinstance(answer, Answer):
        return ["", "", ""]
    position = max(0, min(position, len(answer.ids) - 1))
    steps = playground.steps(answer, position, settings)
    shown, rest = rows(steps, answer.ids[position], picture.SHOWN)
    texts = playground.texts(name, [row.token for row in shown])
    return ["", picture.strip(answer, position), picture.chart(steps, shown, rest, texts, settings.strategy)]


def _mover(by: int) -> Callable[[Answers, str, int], int]:
    def move(found: Answers, name: str, position: int) -> int:
        answer = found.get(name)
        last = len(answer.ids) - 1 if isinstance(answer, Answer) else 0
        return max(0, min(position + by, last))

    return move


def _clicked(event: gr.EventData) -> int:
    return int(event.at)
