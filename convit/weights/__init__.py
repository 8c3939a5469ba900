"""Checkpoints of timm, FAIR, MindCV and ours: names, loading, file formats, published files."""
