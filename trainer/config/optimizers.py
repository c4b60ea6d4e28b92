"""Optimizers by name. Which classes there are and what they take is read from the source of the installed libraries,
because settings are checked without importing torch."""
from __future__ import annotations

import ast
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

TORCH, MORE, BITSANDBYTES = "torch.optim", "pytorch_optimizer.optimizer", "bitsandbytes.optim"
PIP = {MORE: "pytorch-optimizer", BITSANDBYTES: "bitsandbytes"}
LIST = {TORCH: "__all__", MORE: "OPTIMIZER_LIST"}
"""Library -> the list in its source of what it has."""


@dataclass(frozen=True)
class OptimizerKind:
    library: str
    cls: str
    defaults: dict = field(default_factory=dict)
    """Arguments that differ from the library's own defaults."""

    @property
    def averages(self) -> bool:
        """Whether it averages the weights itself, and the average is what is used (schedule-free, arXiv 2405.15682)."""
        return self.cls in ("ScheduleFreeAdamW", "ScheduleFreeRAdam", "ScheduleFreeSGD")

    @property
    def estimates(self) -> bool:
        """Whether it estimates the learning rate, one for all of its parameters, and what it is given is a factor."""
        return self.cls == "Prodigy" or self.cls.startswith("DAdapt")

    @property
    def by_parameter(self) -> bool:
        """Whether each parameter takes its steps by itself, whatever the others do."""
        return self.library in (TORCH, BITSANDBYTES) or self.cls in ("CAME", "AdaFactor", "Lion", "StableAdamW")

    @property
    def by_number(self) -> bool:
        """Whether each number of a weight takes its steps by itself, so that processes may have parts of it."""
        return (self.library, self.cls) in ((TORCH, "AdamW"), (MORE, "Lion"), (MORE, "ScheduleFreeAdamW"))


NAMED = {
    "adamw": OptimizerKind(TORCH, "AdamW"),
    "adamw8bit": OptimizerKind(BITSANDBYTES, "AdamW8bit"),
    "muon": OptimizerKind(TORCH, "AdamW"),  # of what is no matrix
    "came": OptimizerKind(MORE, "CAME"),
    # d's estimate leaves the learning rate out, which is small during warm-up.
    "prodigy": OptimizerKind(MORE, "Prodigy", {"safeguard_warmup": True}),
    # The learning rate is ours, and there is no first moment (arXiv 1804.04235, algorithm 4) unless betas ask for one.
    "adafactor": OptimizerKind(MORE, "AdaFactor", {"betas": (None, 0.999), "relative_step": False,
                                                   "scale_parameter": False}),
    "lion": OptimizerKind(MORE, "Lion"),
    "schedule_free_adamw": OptimizerKind(MORE, "ScheduleFreeAdamW"),
    "stable_adamw": OptimizerKind(MORE, "StableAdamW"),
}

REFUSED = {
    **dict.fromkeys(("LBFGS", "AliG", "BSAM"), "asks for the loss several times in a step"),
    **dict.fromkeys(("AdaHessian", "SophiaH"), "asks for second derivatives"),
    **dict.fromkeys(("LOMO", "AdaLOMO", "AdamMini"), "takes a whole network instead of parameters"),
    **dict.fromkeys(("Muon", "AdaMuon", "AdaGO", "DistributedMuon", "MuonClip", "NorMuon"),
                    "takes only matrices: optimizer.name='muon' trains the rest with AdamW"),
    **dict.fromkeys(("SpectralSphere", "DeMo"), "takes only matrices"),
    "SparseAdam": "takes only sparse gradients",
    "Magma": "is a wrapper of another one",
    **dict.fromkeys(("AdaShift", "Alice", "Conda", "DAdaptLion", "DAdaptSGD", "EmoFact", "EmoLynx", "EmoNavi", "Kron",
                     "LoRARite", "MADGRAD", "Ranger21", "SPAM", "ScalableShampoo", "StableSPAM"),
                    "does not go on as it would have from what it keeps for each parameter"),
}
"""Class -> why the trainer has no use for it."""

OURS = {"lr": "optimizer.learning_rate", "betas": "optimizer.betas", "eps": "optimizer.eps",
        "weight_decay": "optimizer.weight_decay", "params": "the recipe", "foreach": "the trainer"}
"""Argument -> what decides it, so that it is none of optimizer.arguments."""


def kind(name: str) -> OptimizerKind | None:
    """What a name stands for, one of ours or a class of torch.optim or pytorch_optimizer; None where it is unknown."""
    if name in NAMED:
        return NAMED[name]
    library = next((one for one in (TORCH, MORE) if name in classes(one)), None)
    return None if library is None else OptimizerKind(library, name)


# --- Source

def place(library: str) -> Path | None:
    """The folder of a library, or of a package in it."""
    top, *inner = library.split(".")
    spec = find_spec(top)
    return Path(spec.origin).parent.joinpath(*inner) if spec else None


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def classes(library: str) -> tuple[str, ...]:
    """Names of the optimizers that a library lists; none where it is not installed."""
    folder = place(library)
    if folder is None:
        return ()
    assigned = {ast.unparse(target): node.value for node in parsed(folder / "__init__.py").body
                if isinstance(node, ast.Assign | ast.AnnAssign)
                for target in (node.targets if isinstance(node, ast.Assign) else [node.target])}
    listed = assigned[LIST[library]]
    names = {one.value if isinstance(one, ast.Constant) else one.id for one in listed.elts}
    return tuple(sorted(n for n in names if n[0].isupper() and n != "Optimizer" and n not in REFUSED))


def arguments(chosen: OptimizerKind) -> dict[str, object]:
    """Argument of a class -> its default as far as it is a plain value; empty where the source does not show them."""
    folder = place(chosen.library)
    found = folder and definition(folder / "__init__.py", chosen.cls)
    method = next((one for one in found.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None) \
        if found else None
    if method is None:
        return {}
    names = [one.arg for one in method.args.args[2:]]  # after self and the parameters
    defaults = [None] * (len(names) - len(method.args.defaults)) + method.args.defaults[-len(names):]
    names += [one.arg for one in method.args.kwonlyargs]
    return {name: plain(value) for name, value in zip(names, [*defaults, *method.args.kw_defaults], strict=True)}


def plain(value: ast.expr | None):
    try:
        return ast.literal_eval(value)
    except (TypeError, ValueError):
        return None


def definition(file: Path, name: str) -> ast.ClassDef | None:
    """Where a class is defined that a file defines or imports from its own library."""
    for node in parsed(file).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and name in {alias.asname or alias.name for alias in node.names}:
            folder = file.parent if node.level else place(node.module.split(".")[0])
            parts = node.module.split(".")[0 if node.level else 1:]
            there = folder.joinpath(*parts)
            there = there / "__init__.py" if there.is_dir() else there.with_suffix(".py")
            return definition(there, name) if there.is_file() else None
    return None
