"""The node that loads a file which the trainer exported."""
from __future__ import annotations

import folder_paths
from safetensors import SafetensorError, safe_open

from ....models_impl import known_files

LORA, ANY_LORA = "PixStack_PixArtLoraLoader", "LoraLoaderModelOnly"


def loader_of(folder: str, name: str) -> dict:
    """{"node": id of the node}. Raises ValueError with what to do where ComfyUI does not list the file, or no node
    takes it. folder: below models/. Only the file's header is read."""
    if folder not in folder_paths.folder_names_and_paths or name not in folder_paths.get_filename_list(folder):
        raise ValueError(f"ComfyUI does not list {name} among its {folder}. It was written below "
                         f"{folder_paths.models_dir}: copy it into a folder that this ComfyUI reads {folder} from, and "
                         "press the button again.")
    try:
        with safe_open(folder_paths.get_full_path_or_raise(folder, name), framework="pt") as file:
            keys, metadata = list(file.keys()), file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    kind = known_files.kind_of(keys)
    if kind is None or not kind.nodes:
        raise ValueError(f"No node of ComfyUI loads {name}. {known_files.whose(dict.fromkeys(keys))}")
    if kind.name == known_files.LORA:
        return {"node": LORA if metadata.get("pixstack.family") == "pixart_lora" else ANY_LORA}
    own = [node for node in kind.nodes if node.startswith("PixStack_")]
    return {"node": (own or kind.nodes)[0]}
