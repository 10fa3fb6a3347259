"""Makes torch compute the same bytes again."""

import os
import random

from tasks.stage.params import Compute


def prepare_torch(seed: int, compute: Compute) -> None:
    """Seed Python, NumPy and torch, set the threads, and ask for deterministic algorithms (imports torch).

    On a GPU an operation without a deterministic form warns instead of ending hours of work.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if compute.threads is not None:
        torch.set_num_threads(compute.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # under a mask its gradients can be NaN on Hopper GPUs (github.com/pytorch/pytorch/issues/196678)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
