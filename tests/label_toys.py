"""Items to rank, without a model."""

from tasks.labels.sheet import Answer, Item

TEXTS = ["Somebody wants the report.", "<b>Somebody</b> **shouts**.", "Nothing."]
VARIANTS = ["base", "finetune", "ppo"]


def items(count: int, of: str = "a day", texts: list[str] = TEXTS) -> list[Item]:
    return [
        Item(
            prompt=f"Summarize {of} ({number}).\n\n#Person1#: Where is it?",
            group=f"{of} {number}",
            answers=tuple(
                Answer(text=text, variants=(name,)) for text, name in zip(texts, VARIANTS, strict=True)
            ),
        )
        for number in range(count)
    ]
