"""What an experiment needs around the models: parameters, data, the training epoch, evaluation, figures."""

import os

# Where MPLBACKEND names what is not installed, importing matplotlib fails, as torchmetrics does: plots.py puts it back.
KEPT = os.environ.get("MPLBACKEND", "").startswith("module://")  # a notebook's own; that one is not looked for at once
BACKEND = "" if KEPT else os.environ.pop("MPLBACKEND", "")
