"""What params.yaml says of another engine that answers (tasks/lm/engine.py)."""

from typing import Annotated

from pydantic import Field

from tasks.stage import Section


class EngineSettings(Section):
    """vLLM in the environment of the interpreter `python`, with the share `memory` of a GPU."""

    python: Annotated[str, Field(min_length=1)]
    memory: Annotated[float, Field(gt=0, lt=1)]
