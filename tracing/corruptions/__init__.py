"""Corruptions of a prompt: other words or pictures, noise, and ablation; all of them keep the prompt's length."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
