"""ConViT for PyTorch: the attention modules, the models, and what brings them to existing models."""
