"""The trainer beside ComfyUI: its monitor in a tab of the sidebar. Nothing of the trainer is imported."""
