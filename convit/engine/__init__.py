"""Training, validation and inference from recipes: what both frameworks share here, their own parts in ``pytorch`` and ``mindspore``."""
