"""A module or file, as one of several processes: `launched.py -m MODULE ...` or `launched.py FILE ...`.

DeepSpeed compiles an operation for processes that share a CPU's memory when it is first used, which takes a compiler
and a minute. Here it does without, as on every system but Linux: gloo adds the tensors up.
"""
import os
import runpy
import sys

if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(sys.argv[0])
        runpy.run_path(sys.argv[0], run_name="__main__")
