"""The commands of python -m trainer."""
from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings

from ...models_impl.parsing import shortened
from . import (
    cache,
    caption,
    convert,
    data,
    doctor,
    evaluate,
    export,
    importing,
    lora,
    monitor,
    pairs,
    sample,
    settings,
    sheets,
    train,
)

COMMANDS = {"train": train, "cache": cache, "pairs": pairs, "data": data, "doctor": doctor, "caption": caption,
            "settings": settings, "sample": sample, "sheets": sheets, "export": export, "convert": convert,
            "lora": lora, "import": importing, "evaluate": evaluate, "monitor": monitor}


def main(words: list[str] | None = None):
    top = parser()
    args, rest = top.parse_known_args(words)
    if rest and "settings" in args and all("=" in word and not word.startswith("-") for word in rest):
        args.settings += rest  # argparse does not take key=value after an option
    elif rest:
        top.error(f"not understood: {' '.join(rest)}")
    # Said once per process by every bf16 run on a CPU; it is about speed, and there is nothing to do about it.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    # peft imports bitsandbytes where it is installed, which warns that kernels are absent that nothing here calls.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # Where accelerate's launcher asks for FSDP, transformers reads a file in only one process and leaves nonsense in
    # the others: accelerate's FSDP would mend that, this trainer's does not.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    try:
        args.run(args)
    except BrokenPipeError:  # `settings | head`: who reads has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at the end
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {shortened(str(error))}")
    except KeyboardInterrupt:
        print("\nstopped; what was written is whole, and the same command goes on or begins anew.", file=sys.stderr)
        sys.exit(130)


def parser() -> argparse.ArgumentParser:
    """Each command has a file with its arguments and the function that runs it, whose docstring is the help."""
    top = argparse.ArgumentParser(prog="python -m trainer", description="Trains the models of PixStack.")
    commands = top.add_subparsers(required=True, metavar="command")
    for name, command in COMMANDS.items():
        one = commands.add_parser(name, help=command.run.__doc__, description=command.run.__doc__)
        one.set_defaults(run=command.run)
        command.add_arguments(one)
    return top
