"""Training, validation and inference from recipes: what both frameworks share here, what each does by itself in ``pytorch`` and ``mindspore``."""
