"""Where the nodes lean on ComfyUI, checked against the one that runs: every name that they read of it and every call
that they make, as they stand in nodes/, and the functions of core by whose parameters core calls ours back. What a
newer ComfyUI changes there fails here by its name, before a graph fails somewhere."""

import ast
import inspect
import sys
from collections import defaultdict
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview"}


# What nodes/ says


class Reader(ast.NodeVisitor):
    """Reads one file of nodes/: `names` of core -> lines, and `calls` of them -> [(line, call, how many positional
    arguments Python adds)]. `optional`: those that the file can do without, for it asks with hasattr or getattr or
    expects an ImportError."""

    def __init__(self, path: Path):
        self.aliases: dict[str, str] = {}
        self.names, self.calls, self.bases = defaultdict(list), defaultdict(list), []
        tree = ast.parse(path.read_text(encoding="utf-8"))
        self.optional = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for name in node.names:
                    top = name.name.split(".")[0]
                    if top in CORE:
                        self.aliases[name.asname or top] = name.name if name.asname else top
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in CORE:
                for name in node.names:
                    self.aliases[name.asname or name.name] = f"{node.module}.{name.name}"
                    self.names[f"{node.module}.{name.name}"].append(node.lineno)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("hasattr", "getattr"):
                owner, name = self.dotted(node.args[0]), node.args[1]
                if owner and isinstance(name, ast.Constant):
                    self.optional.add(f"{owner}.{name.value}")
            if isinstance(node, ast.Try) and "ImportError" in {getattr(h.type, "id", "") for h in node.handlers}:
                self.optional |= {self.aliases[name.asname or name.name] for part in node.body
                                  if isinstance(part, ast.ImportFrom) for name in part.names
                                  if (name.asname or name.name) in self.aliases}
        self.visit(tree)

    def dotted(self, node) -> str | None:
        """The name in core that an expression is, if it is one."""
        if isinstance(node, ast.Attribute) and (owner := self.dotted(node.value)):
            return f"{owner}.{node.attr}"
        return self.aliases.get(node.id) if isinstance(node, ast.Name) else None

    def visit_ClassDef(self, node):
        self.bases.append(next(filter(None, map(self.dotted, node.bases)), None))
        self.generic_visit(node)
        self.bases.pop()

    def visit_Attribute(self, node):
        if name := self.dotted(node):
            self.names[name].append(node.lineno)
        self.generic_visit(node)

    def visit_Call(self, node):
        if name := self.dotted(node.func):
            self.calls[name].append((node.lineno, node, 0))
        elif (isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Call)
              and getattr(node.func.value.func, "id", None) == "super" and self.bases and self.bases[-1]):
            self.calls[f"{self.bases[-1]}.{node.func.attr}"].append((node.lineno, node, 1))
        self.generic_visit(node)


def read_nodes() -> tuple[dict, dict, set]:
    names, calls, optional = defaultdict(list), defaultdict(list), set()
    for path in sorted((ROOT / "nodes").rglob("*.py")):
        found, place = Reader(path), path.relative_to(ROOT)
        for name, lines in found.names.items():
            names[name].append(f"{place}:{lines[0]}")
        for name, made in found.calls.items():
            calls[name] += [(f"{place}:{line}", node, added) for line, node, added in made]
        optional |= found.optional
    return dict(sorted(names.items())), dict(sorted(calls.items())), optional


NAMES, CALLS, OPTIONAL = read_nodes()
DYNAMIC = {"comfy.model_management.archive_model_dtypes"}
"""What is only used of a ComfyUI that has DynamicVRAM."""


def may_lack(name: str) -> bool:
    """Whether the nodes do without a name in the running ComfyUI."""
    dynamic = hasattr(import_module("comfy.model_patcher"), "ModelPatcherDynamic")
    return any(f"{name}.".startswith(f"{known}.") for known in OPTIONAL | (set() if dynamic else DYNAMIC))


def of_core(dotted: str):
    """The thing in the running ComfyUI; AttributeError or ImportError where it is gone."""
    module, rest = dotted.split("."), []
    while True:
        try:
            found = import_module(".".join(module))
            break
        except ModuleNotFoundError as error:
            if len(module) == 1 or not ".".join(module).startswith(error.name):
                raise
            rest.insert(0, module.pop())
    for name in rest:
        found = getattr(found, name)
    return found


@pytest.fixture(scope="module")
def version(host) -> str:
    return f"ComfyUI {import_module('comfyui_version').__version__}"


@pytest.mark.parametrize("name", NAMES)
def test_what_the_nodes_read_of_core_is_there(name, version):
    try:
        of_core(name)
    except (AttributeError, ImportError) as error:
        if may_lack(name):
            pytest.skip(f"{version} has no {name}, and the nodes do without")
        pytest.fail(f"{version} has no {name}, which {NAMES[name][0]} uses ({error})", pytrace=False)


@pytest.mark.parametrize("name", CALLS)
def test_core_takes_the_calls_that_the_nodes_make(name, version):
    try:
        signature = inspect.signature(of_core(name))
    except ValueError:
        pytest.skip("written in C, without a signature")
    except (AttributeError, ImportError) as error:
        if may_lack(name):
            pytest.skip(f"{version} has no {name}, and the nodes do without")
        pytest.fail(f"{version} has no {name}, which {CALLS[name][0][0]} calls ({error})", pytrace=False)
    for place, call, added in CALLS[name]:
        positional = [None] * (added + sum(not isinstance(a, ast.Starred) for a in call.args))
        keywords = {k.arg: None for k in call.keywords if k.arg}
        open_ended = len(keywords) < len(call.keywords) or any(isinstance(a, ast.Starred) for a in call.args)
        try:
            (signature.bind_partial if open_ended else signature.bind)(*positional, **keywords)
        except TypeError as error:
            pytest.fail(f"{version} does not take {place}: {name}{signature}: {error}", pytrace=False)


# What the nodes hold objects of, and core calls back


METHODS = {
    "comfy.model_patcher.ModelPatcher": (
        "clone()", "add_patches(patches, strength_patch=1.0)", "add_object_patch(name, obj)",
        "get_model_object(name)", "add_wrapper_with_key(wrapper_type, key, wrapper)",
        "remove_wrappers_with_key(wrapper_type, key)", "add_callback_with_key(call_type, key, callback)",
        "remove_callbacks_with_key(call_type, key)", "set_additional_models(key, models)",
        "get_additional_models_with_key(key)", "set_attachments(key, attachment)", "get_attachment(key)",
        "set_model_sampler_cfg_function(sampler_cfg_function)",
    ),
    "comfy.model_base.BaseModel": (
        "load_model_weights(sd, unet_prefix)", "get_dtype()", "process_latent_in(latent)",
        "memory_required(input_shape, cond_shapes)",
    ),
    "comfy.sd.CLIP": (
        "clone()", "load_sd(sd)", "tokenize(text)", "encode_from_tokens_scheduled(tokens)",
        "add_patches(patches, strength_patch=1.0)",
    ),
    "comfy.sd.VAE": ("decode(samples_in)", "encode(pixel_samples)", "spacial_compression_encode()"),
    "comfy.controlnet.ControlBase": (
        "copy_to(c)", "set_previous_controlnet(controlnet)",
        "set_cond_hint(cond_hint, strength, timestep_percent_range, vae)",
    ),
    "comfy.supported_models_base.BASE": ("set_inference_dtype(dtype, manual_cast_dtype)",),
    "comfy.utils.ProgressBar": ("update(value)", "update_absolute(value, total)"),
    "latent_preview.Latent2RGBPreviewer": ("decode_latent_to_preview(x0)",),
}
"""Methods of core's objects -> the parameters that we give, by position or by name."""


def known(name: str) -> list[str]:
    return [f"{name}.{method}" for method in METHODS[name]]


@pytest.mark.parametrize("method", [m for name in METHODS for m in known(name)])
def test_core_s_objects_have_the_methods_that_the_nodes_call(method, version):
    name, _, given = method.rstrip(")").partition("(")
    try:
        parameters = inspect.signature(of_core(name)).parameters
    except AttributeError:
        pytest.fail(f"{version} has no {name}, which the nodes call", pytrace=False)
    wanted = [part.split("=")[0].strip() for part in given.split(",") if part]
    needed = [p for p in list(parameters)[1:]
              if parameters[p].default is inspect.Parameter.empty and parameters[p].kind
              not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)]
    assert list(parameters)[1 : 1 + len(wanted)] == wanted, f"{version}: {name}({', '.join(parameters)})"
    assert set(needed) <= set(wanted), f"{version}: {name} wants {', '.join(needed)}, the nodes give ({given})"


HOOKS = {
    "comfy.controlnet.ControlNet.get_control": "x_noisy, t, cond, batched_number, transformer_options",
    "comfy.controlnet.ControlBase.pre_run": "model, percent_to_timestep_function",
    "comfy.controlnet.ControlBase.cleanup": "",
    "comfy.controlnet.ControlBase.set_cond_hint": "cond_hint, strength, timestep_percent_range, vae, extra_concat",
    "comfy.controlnet.ControlBase.get_models": "",
    "comfy.controlnet.ControlBase.copy_to": "c",
    "comfy.conds.CONDRegular.process_cond": "batch_size, **kwargs",
    "comfy.conds.CONDRegular._copy_with": "cond",
    "comfy.conds.CONDRegular.can_concat": "other",
    "comfy.conds.CONDRegular.concat": "others",
    "comfy.conds.CONDRegular.size": "",
    "comfy.ldm.cascade.common.AttnBlock.forward": "x, kv, transformer_options",
    "comfy.ldm.cascade.common.GlobalResponseNorm.forward": "x",
    "comfy.ldm.cascade.stage_c.StageC.forward":
        "x, r, clip_text, clip_text_pooled, clip_img, control, transformer_options, **kwargs",
    "comfy.model_base.BaseModel.extra_conds": "**kwargs",
    "comfy.model_base.BaseModel.apply_model":
        "x, t, c_concat, c_crossattn, control, transformer_options, **kwargs",
    "comfy.model_base.BaseModel._apply_model":
        "x, t, c_concat, c_crossattn, control, transformer_options, **kwargs",
    "comfy.model_base.BaseModel.memory_required": "input_shape, cond_shapes",
    "comfy.model_sampling.EPS.calculate_input": "sigma, noise",
    "comfy.model_sampling.EPS.calculate_denoised": "sigma, model_output, model_input",
    "comfy.model_sampling.EPS.noise_scaling": "sigma, noise, latent_image, max_denoise",
    "comfy.model_sampling.EPS.inverse_noise_scaling": "sigma, latent",
    "comfy.model_sampling.ModelSamplingDiscrete.timestep": "sigma",
    "comfy.model_sampling.ModelSamplingDiscrete.sigma": "timestep",
    "comfy.model_sampling.ModelSamplingDiscrete.percent_to_sigma": "percent",
    "comfy.samplers.KSAMPLER.sample":
        "model_wrap, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar",
    "comfy.sd.VAE.decode": "samples_in, vae_options",
    "comfy.sd.VAE.encode": "pixel_samples",
    "comfy.sd.VAE.decode_tiled": "samples, tile_x, tile_y, overlap, tile_t, overlap_t",
    "comfy.sd1_clip.SD1ClipModel.encode_token_weights": "token_weight_pairs",
    "comfy.sd1_clip.SD1ClipModel.load_sd": "sd",
    "comfy.sd1_clip.SD1Tokenizer.state_dict": "",
    "comfy.sd1_clip.SD1Tokenizer.tokenize_with_weights": "text, return_word_ids, **kwargs",
    "comfy.sd1_clip.SDTokenizer.tokenize_with_weights": "text, return_word_ids, tokenizer_options, **kwargs",
    "comfy.supported_models_base.BASE.get_model": "state_dict, prefix, device",
    "comfy.supported_models_base.BASE.process_unet_state_dict_for_saving": "state_dict",
    "comfy.weight_adapter.WeightAdapterBase.calculate_weight":
        "weight, key, strength, strength_model, offset, function, intermediate_dtype, original_weight",
    "comfy_api.latest.ComfyExtension.get_node_list": "",
}
"""Functions of core in whose place ours are called -> their parameters, which are the same in 0.3.75 and in 0.33. A new
one would reach a function of ours that does not know it."""
MAY_LACK = {"comfy.controlnet.ControlBase.deepclone_multigpu": "load_device, autoregister"}
"""The same for what only newer ComfyUIs call."""


@pytest.mark.parametrize("name", [*HOOKS, *MAY_LACK])
def test_core_calls_our_functions_with_the_parameters_that_they_know(name, version):
    try:
        parameters = list(inspect.signature(of_core(name)).parameters.values())[1:]
    except AttributeError:
        if name in MAY_LACK:
            pytest.skip(f"{version} has no {name}")
        pytest.fail(f"{version} has no {name} any more, so nothing calls ours", pytrace=False)
    wanted = {**HOOKS, **MAY_LACK}[name]
    found = ", ".join(("**" if p.kind is p.VAR_KEYWORD else "*" if p.kind is p.VAR_POSITIONAL else "") + p.name
                      for p in parameters)
    assert found == wanted, f"{version} calls {name}({found}); the nodes were written for ({wanted})"


RESTATED = {
    "comfy.model_base.Flux.extra_conds", "comfy.model_base.PixArt.extra_conds",  # BaseModel's, restated by core
    "comfy.model_base.StableCascade_B.extra_conds", "comfy.model_base.StableCascade_C.extra_conds",  # likewise
    "comfy.samplers.Sampler.sample",  # empty; KSAMPLER's says how it is called
}


def _there(name: str) -> bool:
    try:
        of_core(name)
    except AttributeError:
        return False
    return True


def test_every_function_of_core_that_a_class_of_ours_replaces_is_recorded(host):
    """Constructors apart: the calls of core's are checked above."""
    ours = [module for name, module in sys.modules.items() if name.split(".nodes.host")[0].endswith("pixstack")
            and ".nodes.host" in name]
    assert ours
    replaced = set()
    for module in ours:
        for kind in vars(module).values():
            if isinstance(kind, type) and kind.__module__ == module.__name__:
                replaced |= {f"{base.__module__}.{base.__qualname__}.{name}" for base in kind.__mro__[1:]
                             if base.__module__.split(".")[0] in CORE for name, value in vars(kind).items()
                             if inspect.isfunction(value) and name in vars(base) and name != "__init__"}
    recorded = {of_core(name) for name in (*HOOKS, *MAY_LACK) if _there(name)}
    missing = [name for name in sorted(replaced) if of_core(name) not in recorded and name not in RESTATED]
    assert not missing, missing
