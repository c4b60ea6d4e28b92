"""`python -m trainer` from the repository root. See package/pixstack for why the root gets a name first."""
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    # The root must leave sys.path: our `nodes` and `kernels` would shadow ComfyUI's and Hugging Face's. So must this
    # folder, which is there when this file is run by its path.
    others = [p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "trainer")]
    sys.path[:] = [str(ROOT / "package"), *others]
    import_module("pixstack.trainer.cli.main").main()
