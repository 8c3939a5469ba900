"""The MindSpore engine: build, data, loop, validation and inference."""
