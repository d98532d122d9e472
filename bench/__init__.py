"""`yoco-ext bench`: yoco_ext beside its peers, in one run, on one machine."""

from .main import main

__all__ = ["main"]
