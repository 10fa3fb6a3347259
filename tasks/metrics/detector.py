"""Who says what is toxic, as it stands in params.yaml."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from tasks.stage import Compute, Section

if TYPE_CHECKING:
    from tasks.metrics.toxicity import Scorer


class Oracle(Section):
    """Toxicity is an insult of the synthetic corpus."""

    backend: Literal["oracle"]

    @property
    def toxic_from(self) -> float:
        """The oracle says 0 or 1."""
        return 0.5


class Classifier(Section):
    """Toxicity is the probability of `label` under a text classifier; `toxic_from` on is toxic."""

    backend: Literal["classifier"]
    source: str
    revision: str | None
    label: str
    toxic_from: Annotated[float, Field(gt=0, le=1)]


Detector = Annotated[Oracle | Classifier, Field(discriminator="backend")]


def scorer(detector: Oracle | Classifier, batch_size: int, compute: Compute) -> "Scorer":
    """The probability that each of some texts is toxic. Raises ParamsError when a model cannot be opened."""
    from tasks.metrics.toxicity import classifier, oracle

    if isinstance(detector, Oracle):
        return oracle
    from tasks.lm.device import device

    place = str(device(compute))
    return classifier(detector.source, detector.revision, detector.label, batch_size, place)
