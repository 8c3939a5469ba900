"""The variants for ``torch.hub.load(FOLDER_OR_REPOSITORY, "convit_tiny", pretrained=True)``, where convit is installed."""

from functools import partial

from convit.architecture import VARIANTS
from convit.pytorch.model import create_model

dependencies = ["torch", "numpy"]

globals().update({name: partial(create_model, name) for name in VARIANTS})
