"""What a run needs before it is started: parameters, memory, compute, and what would make it fit."""
