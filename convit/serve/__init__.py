"""A ConViT over HTTP: ``create_app(model)`` is an ASGI application, ``convit serve CHECKPOINT`` runs it (see docs/serve.md)."""

from convit.serve.app import create_app

__all__ = ["create_app"]
