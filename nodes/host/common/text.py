"""T5 encoders as ComfyUI CLIP objects, each with its own tokenizer.

Core loads a 2048 wide T5 as AuraFlow's, with another vocabulary, so flan-t5-xl needs this loader. For PixelFlow and
PixArt the text is encoded at its real length: padding it and masking the padding, as the references do, gives the same
numbers. FLUX attends to all of its tokens, so for it the text is padded and nothing is masked.
"""
from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path

import comfy.sd
import comfy.sd1_clip
import comfy.text_encoders.sd3_clip
import comfy.text_encoders.t5
import comfy.utils
import folder_paths
import torch
from comfy.supported_models_base import ClipTarget
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, T5TokenizerFast

from ....models_impl.guard import reading
from ....models_impl.known_files import WrongFile
from ....models_impl.parsing import without_surrogates
from ....models_impl.state_dict import check_values, expected_shapes, metadata_tensor, read_file, without_prefix
from ....models_impl.text import MAX_LENGTH, shapes
from . import quantised
from .patcher import reloadable, to_own_dtypes
from .shown import warn

STANDARD_TOKENIZER = Path(comfy.text_encoders.sd3_clip.__file__).parent / "t5_tokenizer"  # T5 v1.1's and flan-T5's
ACTIVATIONS = {"gelu_new": "gelu_pytorch_tanh", "gelu_pytorch_tanh": "gelu_pytorch_tanh", "relu": "relu"}
FILLED = "pixstack_filled"  # entry of a conditioning: whether its text is; core's encoders leave none
SAVED = "t5.transformer."  # how core's nodes name the weights of our CLIP in a file
BESIDE_SAVED = ("t5.logit_scale",)
FIXED_IN_COMFYUI = {"relative_attention_num_buckets": 32, "layer_norm_epsilon": 1e-6}


def load_t5(
    path: str, dtype: torch.dtype | None = None, device: torch.device | None = None, padded: bool = False,
    disable_dynamic: bool = False,
) -> comfy.sd.CLIP:
    """A T5 encoder file as CLIP. dtype None stores the weights as the file does; device None lets ComfyUI choose;
    padded: texts are padded to the encoder's full length, and the padding is attended to like words, as in FLUX."""
    with reading(path):
        clip = _clip(Path(path), dtype, device, padded, disable_dynamic)
    reloadable(clip.patcher, load_t5_patcher, path, dtype, device, padded)
    return clip


def _clip(file: Path, dtype: torch.dtype | None, device: torch.device | None, padded: bool, disable_dynamic: bool
          ) -> comfy.sd.CLIP:
    tensors, metadata = read_file(file, quantised.runnable())
    tensors = encoder_weights(tensors, file.name)
    check_values({key: value for key, value in tensors.items() if torch.is_tensor(value) and value.is_floating_point()},
                 f"this T5 ({file.name})")
    config = shapes.configuration(tensors, metadata)
    if config["dense_act_fn"] not in ACTIVATIONS:
        raise ValueError(f"ComfyUI's T5 knows the activations {', '.join(ACTIVATIONS)}, this file was trained with "
                         f"{config['dense_act_fn']}.")
    if text := metadata.get("pixstack.tokenizer"):
        shapes.tokenizer(text)
    for name, value in FIXED_IN_COMFYUI.items():
        if config.get(name, value) != value:
            raise ValueError(f"{file.name}: ComfyUI's T5 knows only {name}={value}, this file was trained with "
                             f"{config[name]}.")
    kept = quantised.kept(tensors, dtype)
    if kept or dtype is None:
        dtype = comfy.utils.weight_dtype(tensors)
    options = {"dtype": dtype, "t5_config": t5_config(config), "t5_filled": padded, "t5_file": file.name}
    if kept:
        options["custom_operations"] = quantised.encoder_operations(kept, dtype)
    if device is not None:
        options.update(load_device=device, offload_device=device)
    taken = inspect.signature(comfy.sd.CLIP.__init__).parameters
    later = {"state_dict": [tensors], "disable_dynamic": disable_dynamic}  # of ComfyUI after 0.3.75
    clip = comfy.sd.CLIP(
        ClipTarget(Tokenize, Encode),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=comfy.utils.calculate_parameters(tensors),
        tokenizer_data={
            "t5_tokenizer": metadata.get("pixstack.tokenizer"),
            "t5_max_length": config["max_length"],
            "t5_width": config["d_model"],
            "t5_filled": padded,
            "t5_metadata": {name: text for name, text in metadata.items() if name.startswith("pixstack.")},
        },
        model_options=options,
        **{name: value for name, value in later.items() if name in taken},
    )
    if "state_dict" not in taken:
        clip.load_sd(tensors)
    return clip


def load_t5_patcher(path: str, *how, disable_dynamic: bool = False):
    """The ModelPatcher that `load_t5` puts into the CLIP."""
    return load_t5(path, *how, disable_dynamic=disable_dynamic).patcher


def encoder_weights(tensors: dict, name: str) -> dict:
    """The encoder of a T5 file under Hugging Face's names; a whole T5 may come along, its decoder is left out."""
    tensors = without_prefix({key: value for key, value in tensors.items() if key not in BESIDE_SAVED})
    tensors = {key.removeprefix(SAVED): value for key, value in tensors.items()}
    if "encoder.block.0.layer.0.SelfAttention.q.weight" not in tensors:
        raise WrongFile(f"{name} is not a T5 text encoder.", tensors)
    if "encoder.embed_tokens.weight" in tensors:  # shared.weight under another name
        tensors = {"shared.weight": tensors["encoder.embed_tokens.weight"], **tensors}
    if "shared.weight" not in tensors:
        raise ValueError(f"{name} is not a complete T5 encoder: it has no shared.weight.")
    return {k: v for k, v in tensors.items()
            if not k.startswith(("decoder.", "lm_head.")) and k != "encoder.embed_tokens.weight"}


def t5_config(config: dict) -> dict:
    """The dictionary that ComfyUI's T5 reads."""
    names = ("d_model", "d_ff", "d_kv", "num_heads", "num_layers", "vocab_size", "is_gated_act")
    return {**{k: config[k] for k in names}, "dense_act_fn": ACTIVATIONS[config["dense_act_fn"]], "model_type": "t5"}


class T5Tokenizer(comfy.sd1_clip.SDTokenizer):
    """A tokenizer that gives one sequence, padded only for FLUX. What exceeds the length that the encoder was trained
    with is cut, with a warning."""

    def __init__(self, embedding_directory=None, tokenizer_data=None):
        data = tokenizer_data or {}
        text = data.get("t5_tokenizer")
        super().__init__(
            text or str(STANDARD_TOKENIZER),
            tokenizer_class=FromText if text else T5TokenizerFast,
            embedding_directory=embedding_directory,
            embedding_size=data.get("t5_width", 0),
            embedding_key="t5",
            max_length=MAX_LENGTH,
            pad_with_end=False,
            has_start_token=False,
            pad_to_max_length=False,
            tokenizer_data=data,
        )
        self.padded = data.get("t5_filled", False)

    def tokenize_with_weights(self, text: str, return_word_ids=False, **kwargs):
        # core breaks a long text into sequences of max_length, each with its own </s>: taken apart again here
        chunks = super().tokenize_with_weights(without_surrogates(text), return_word_ids=True, **kwargs)
        words = [token for chunk in chunks for token in chunk if token[2]]  # (token, weight, word id), id 0 for </s>
        if len(words) > self.max_length - 1:
            warn(f"The text encoder reads {self.max_length - 1} tokens, this prompt has {len(words)}. Its end is left "
                 f"out: ...{text[-60:]}")
        tokens = [*words[: self.max_length - 1], (self.end_token, 1.0, 0)]
        if self.padded:
            self.pad_tokens(tokens, self.max_length - len(tokens))
        return [tokens if return_word_ids else [token[:2] for token in tokens]]


class FromText:
    """A tokenizer from the text of a tokenizer.json instead of a folder."""

    @staticmethod
    def from_pretrained(text: str) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text))


class Tokenize(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None):
        super().__init__(embedding_directory, tokenizer_data or {}, name="t5", tokenizer=T5Tokenizer)
        self.metadata = (tokenizer_data or {}).get("t5_metadata") or {}

    def state_dict(self) -> dict:
        """What core saves beside the weights: the tokenizer and configuration that the file carried."""
        return metadata_tensor(self.metadata) if self.metadata else {}


class T5Model(comfy.sd1_clip.SDClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(
            device=device,
            dtype=dtype,
            textmodel_json_config=model_options["t5_config"],
            model_class=comfy.text_encoders.t5.T5,
            special_tokens={"end": 1, "pad": 0},
            # a weighted prompt is encoded together with a padded empty one
            enable_attention_masks=not model_options["t5_filled"],
            model_options=model_options,
        )


class Encode(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(device=device, dtype=dtype, model_options=model_options, name="t5", clip_model=T5Model)
        self.padded = model_options["t5_filled"]
        self.file = model_options["t5_file"]

    def load_sd(self, sd):
        """Load weights, before the encoder is put on a device. Raises ValueError for weights that do not fit."""
        net = self.t5.transformer
        expected = expected_shapes(net)
        if wrong := [key for key, shape in expected.items() if key in sd and sd[key].shape != shape]:
            raise ValueError(f"{self.file} is not a complete T5 encoder: {len(wrong)} weights have other shapes than "
                             f"its first layer implies, for example {wrong[0]}: {list(sd[wrong[0]].shape)}, expected "
                             f"{list(expected[wrong[0]])}.")
        assign = getattr(self, "can_assign_sd", False)  # set by ComfyUI after 0.3.75 where it moves weights at use
        missing, unexpected = super().load_sd(quantised.for_net(net, sd, assign))
        if missing or unexpected:
            raise ValueError(f"{self.file} is not a complete T5 encoder: {len(missing)} keys are missing "
                             f"({', '.join(missing[:3])}), {len(unexpected)} unexpected ({', '.join(unexpected[:3])}).")
        if not assign:
            to_own_dtypes(self)
        return missing, unexpected

    def encode_token_weights(self, token_weight_pairs):
        tokens, pooled = super().encode_token_weights(token_weight_pairs)
        return tokens, pooled, {FILLED: self.padded}  # core puts these entries into the conditioning


def check_padded(tokens: torch.Tensor | None, width: int, entries: Mapping, model: str):
    """Raise ValueError if a conditioning has no tokens (B, L, width) of a padded text, as small FLUX and Stable Cascade
    models read it. entries: its other ones."""
    if tokens is None or tokens.shape[-1] != width:
        fault = "has no text" if tokens is None else f"has text tokens {tokens.shape[-1]} wide"
        raise ValueError(f"This {model} reads text tokens {width} wide, but its conditioning {fault}. Load the encoder "
                         "that it was trained with ('Load T5 Text Encoder', type flux) and encode the prompt with that "
                         "CLIP.")
    check_type(entries, padded=True, model=model)


def check_type(entries: Mapping, padded: bool, model: str):
    """Raise ValueError if the entries of a conditioning from `load_t5` have another `padded` than the model reads."""
    is_padded = entries.get(FILLED, padded)
    if is_padded and not padded:
        raise ValueError(f"This text is padded as for FLUX, and {model} would read the padding as words. Load the "
                         "encoder with 'Load T5 Text Encoder', type 'pixelflow, pixart'.")
    if padded and not is_padded:
        raise ValueError(f"This text has its own length, as PixelFlow and PixArt read it, and {model} was trained with "
                         "padded text. Load the encoder with 'Load T5 Text Encoder', type flux.")
