"""What the page shows, as HTML: answers, the tokens of one, and the distribution of a token.

Whatever a person or a model wrote is escaped: it is text, never markup.
"""

import html
from collections.abc import Mapping, Sequence

from tasks.playground.answering import Answer
from tasks.playground.distribution import Rest, Row, Step

SHOWN = 12  # tokens with a row of their own
HOW = {
    "Greedy": "Greedy takes the likeliest token of the last column.",
    "Sampling": "Sampling draws from the last column.",
    "Beam search": "Beam search compares whole answers, so a token need not be the likeliest at its place.",
}


def message(text: str) -> str:
    """What is wrong, or nothing."""
    return f'<p class="trouble" role="alert">{html.escape(text)}</p>' if text else ""


def cards(answers: Mapping[str, Answer | str | None], toxic_from: float) -> str:
    """The variants side by side: an answer, what is wrong with it, or None while it is made."""
    return f'<div class="cards">{"".join(_card(name, answers[name], toxic_from) for name in answers)}</div>'


def _card(name: str, answer: Answer | str | None, toxic_from: float) -> str:
    title = f"<h3>{html.escape(name)}</h3>"
    if answer is None:
        return f'<article class="card">{title}<p class="quiet">answering …</p></article>'
    if isinstance(answer, str):
        return f'<article class="card">{title}{message(answer)}</article>'
    text = html.escape(answer.text) if answer.text else '<span class="quiet">(nothing)</span>'
    toxic = answer.toxicity >= toxic_from
    facts = [
        ("toxicity", f'<span class="{"bad" if toxic else "good"}">{answer.toxicity:.2f}</span>'),
        *([] if answer.reward is None else [("reward", f"{answer.reward:+.2f}")]),
        ("tokens", str(len(answer.ids))),
        ("seconds", f"{answer.seconds:.2f}"),
    ]
    listed = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in facts)
    return (
        f'<article class="card">{title}<p class="answer">{text}</p><dl>{listed}</dl>'
        f"<details><summary>the prompt: {_prompt_facts(answer)}</summary>"
        f"<pre>{html.escape(answer.prompt)}</pre></details></article>"
    )


def _prompt_facts(answer: Answer) -> str:
    worked = {0: "", 1: ", 1 worked example"}.get(answer.shots, f", {answer.shots} worked examples")
    cut = f", {answer.cut} cut out of its middle" if answer.cut else ""
    return f"{len(answer.prompt_ids)} tokens{worked}{cut}"


def strip(answer: Answer, position: int) -> str:
    """The tokens of an answer as buttons, the surer the model the darker; the one at `position` is marked."""
    buttons = [
        f'<button type="button" data-at="{at}" style="--sure:{sure:.3f}" title="{sure:.1%}"'
        f"{' aria-current=true' if at == position else ''}>{_token(piece)}</button>"
        for at, (piece, sure) in enumerate(zip(answer.pieces, answer.sureness, strict=True))
    ]
    return f'<div class="strip" role="group" aria-label="tokens of the answer">{"".join(buttons)}</div>'


def chart(
    found: Sequence[Step], rows: Sequence[Row], rest: Rest, names: Mapping[int, str], strategy: str
) -> str:
    """Bars for each token after each step, all on one scale; `names` are the tokens' texts."""
    top = max(value or 0.0 for row in rows for value in row.probabilities)
    heads = "".join(
        f'<th scope="col">{html.escape(step.name)}<small>{int(step.kept.sum()):,} of {len(step.scores):,} left'
        f" · {step.entropy:.2f} nats</small></th>"
        for step in found
    )
    lines = [_line(row, names[row.token], top) for row in rows]
    others = "".join(f"<td>{_bar(value, top, 'rest')}</td>" for value in rest.probabilities)
    if rest.tokens:
        lines.append(f'<tr class="others"><th scope="row">{rest.tokens:,} others</th>{others}</tr>')
    return (
        f'<div class="scroll"><table class="chart"><thead><tr><th scope="col">token</th>{heads}</tr></thead>'
        f'<tbody>{"".join(lines)}</tbody></table></div><p class="quiet">{HOW[strategy]} ▸ marks the token of '
        "the answer. Nats say how open the choice is: 0 when one token is left.</p>"
    )


def _line(row: Row, name: str, top: float) -> str:
    mark = "▸ " if row.chosen else ""
    cells = []
    before = 0.0
    for value in row.probabilities:
        cells.append(f"<td>{_cut(before, top) if value is None else _bar(value, top, '')}</td>")
        before = before if value is None else value
    kind = ' class="chosen"' if row.chosen else ""
    return f'<tr{kind}><th scope="row">{mark}<code>{_token(name)}</code></th>{"".join(cells)}</tr>'


def _bar(value: float, top: float, kind: str) -> str:
    width = min(1.0, value / top)
    return f'<span class="bar {kind}" style="--w:{width:.4f}"></span>{_share(_percent(value))}'


def _cut(before: float, top: float) -> str:
    width = min(1.0, before / top)
    return f'<span class="bar cut" style="--w:{width:.4f}"></span>{_share("cut")}'


def _share(text: str) -> str:
    return f'<span class="share">{text}</span>'


def _percent(value: float) -> str:
    """Two digits that say something."""
    if value >= 0.1:
        return f"{value * 100:.0f} %"
    if value >= 0.001:
        return f"{value * 100:.1f} %"
    return "0 %" if value == 0 else "&lt; 0.1 %"


def _token(text: str) -> str:
    """A token with its spaces and line ends made visible."""
    return html.escape(text).replace(" ", "␣").replace("\n", "⏎") or "∅"
