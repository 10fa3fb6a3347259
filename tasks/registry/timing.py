"""Answers prompts one at a time with a registered model, and says how long each took: a process of its own.

    python tasks/registry/timing.py MODEL_FOLDER      a prompt as JSON on each line in, seconds on each line out

Each version is loaded as a server loads it, with the code that was stored with it. So this file is run by its
path and imports nothing of the repository.
"""

import json
import sys
import time


def main(folder: str) -> None:
    """Answer until stdin ends."""
    import mlflow

    model = mlflow.pyfunc.load_model(folder)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        started = time.perf_counter()
        model.predict([{"prompt": json.loads(line)}])
        sys.stdout.write(f"{time.perf_counter() - started}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
