"""The repository under one importable name, for the trainer, the tools and the tests. ComfyUI never imports this."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2])]
