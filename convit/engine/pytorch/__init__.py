"""The PyTorch engine: build, data, loop, validation and inference."""
