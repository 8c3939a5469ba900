"""Gated positional self-attention: one file per device and tool; see README.md in this folder."""
