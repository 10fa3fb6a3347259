"""What a stage is: typed params, a lock, one recorded run, atomic outputs, an exit code.

Importing this package costs pydantic and ruamel.yaml; torch and mlflow are imported only where they are used.
"""

from tasks.stage.context import Context
from tasks.stage.errors import DataError, GateRefused, Interrupted, ParamsError, TryAgain, UserError
from tasks.stage.params import Compute, Section
from tasks.stage.run import run_stage
from tasks.stage.track import NullTrack, Track

__all__ = [
    "Compute",
    "Context",
    "DataError",
    "GateRefused",
    "Interrupted",
    "NullTrack",
    "ParamsError",
    "Section",
    "Track",
    "TryAgain",
    "UserError",
    "run_stage",
]
