"""Broken files for every loader: of nodes, of the trainer's commands, and pictures and texts of data sets."""
from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import broken_files
import cascade_weights
import numpy
import recorded_pose
import torch
import weights
from PIL import Image
from pixstack.models_impl.annotators import pose
from pixstack.models_impl.state_dict import write_file
from pixstack.trainer.cli.main import main
from safetensors import SafetensorError
from trials import CLEAN, RECOVERED, Trial, Wrong, verdict


@dataclass(frozen=True)
class Loader:
    node: str
    """Our node, without its prefix."""
    widget: str
    """The input that names the file."""
    folder: str
    """In models/."""
    make: Callable[[Path], object]
    """Writes a small good file."""
    suffix: str = ".safetensors"
    inputs: tuple[tuple[str, object], ...] = ()
    """The other inputs that are no widgets: names of what GIVEN makes."""
    texts: tuple[tuple[str, str], ...] = ()
    """What stands in other widgets."""
    name: str = "soak"
    """How the file's name begins, by which some makers choose what to make."""
    values: bool = True
    """Whether what is loaded is a network whose weights can be compared."""


def consistency_decoder(path: Path):
    import diffusers

    widths = (32, 32, 32, 32)
    net = diffusers.ConsistencyDecoderVAE(encoder_block_out_channels=widths, decoder_block_out_channels=widths)
    write_file(path, net.state_dict())


def stage_c(host):
    path = host.models / "diffusion_models" / "soak_given_stage_c.safetensors"
    if not path.exists():
        cascade_weights.tiny_stage_c(path)
    return {"class_type": "UNETLoader", "inputs": {"unet_name": path.name, "weight_dtype": "default"}}


def pixart(host):
    path = host.models / "diffusion_models" / "soak_given_pixart.safetensors"
    if not path.exists():
        weights.tiny_pixart(path)
    return {"class_type": "PixStack_PixArtLoader", "inputs": {
        "model_name": path.name, "variant": "sigma", "prediction": "auto", "positions": "auto", "weights": "ema",
        "dtype": "fp32"}}


def clip_g(host):
    path = host.models / "text_encoders" / "soak_given_clip_g.safetensors"
    if not path.exists():
        cascade_weights.tiny_clip_g(path)
    return {"class_type": "CLIPLoader", "inputs": {"clip_name": path.name, "type": "stable_cascade"}}


def picture(host):
    path = host.input / "soak_given.png"
    if not path.exists():
        weights.picture(path)
    return {"class_type": "LoadImage", "inputs": {"image": path.name}}


GIVEN = {"stage c": stage_c, "pixart": pixart, "clip g": clip_g, "picture": picture}

LOADERS = (
    Loader("PixelFlowLoader", "model_name", "diffusion_models", weights.tiny_pixelflow),
    Loader("PixelFlowTextEncoderLoader", "encoder_name", "text_encoders", weights.tiny_t5),
    Loader("PixArtLoader", "model_name", "diffusion_models", weights.tiny_pixart),
    Loader("PixArtLoader", "model_name", "diffusion_models", weights.tiny_pixart, ".pth"),
    Loader("PixArtLoader", "model_name", "diffusion_models", weights.tiny_emoji, name="pixart_soak"),
    Loader("PixArtControlNetLoader", "control_net_name", "controlnet", weights.tiny_pixart_controlnet, ".pth"),
    Loader("PixArtControlNetLoader", "control_net_name", "controlnet", weights.tiny_emoji, name="pixart_soak"),
    Loader("PixArtLoraLoader", "lora_name", "loras", weights.tiny_pixart_lora, inputs=(("model", "pixart"),),
           values=False),
    Loader("ConsistencyDecoderLoader", "vae_name", "vae", consistency_decoder),
    Loader("FluxLoader", "model_name", "diffusion_models", weights.tiny_emoji, name="flux_soak"),
    Loader("PixelPonderLoader", "control_net_name", "controlnet", weights.tiny_pixelponder, ".pth"),
    Loader("PixelPonderLoader", "control_net_name", "controlnet", weights.tiny_emoji, name="pixelponder_soak"),
    Loader("CascadeLoader", "model_name", "diffusion_models", cascade_weights.small_stage_c),
    Loader("UltraPixelGuideLoader", "guide_name", "model_patches", cascade_weights.tiny_guide, ".pth"),
    Loader("UltraPixelStageALoader", "vae_name", "vae", cascade_weights.tiny_stage_a),
    Loader("UltraPixelPersonalise", "lora_name", "loras", cascade_weights.tiny_personalisation, ".pth",
           inputs=(("model", "stage c"), ("clip", "clip g")), texts=(("token", "[mycat]"), ("base_token", "^cat</w>")),
           values=False),
    Loader("HEDEdges", "hed_name", "annotators", weights.tiny_hed, ".pth", inputs=(("image", "picture"),),
           values=False),
)


class Taken:
    """A node at the end of a graph, which keeps what it is given."""

    RETURN_TYPES = ()
    FUNCTION, CATEGORY, OUTPUT_NODE = "take", "soak", True
    kept: dict = {}

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("*",), "name": ("STRING", {"default": ""})}}

    def take(self, value, name):
        Taken.kept[name] = value
        return {}


def register(host):
    host._nodes.NODE_CLASS_MAPPINGS["Soak_Taken"] = Taken


def widgets(info: dict, node: str) -> dict:
    """The inputs of a node with what a new one has in them."""
    found = {}
    for name, spec in info[node]["input"].get("required", {}).items():
        options = spec[1] if len(spec) > 1 else {}
        if isinstance(spec[0], list):
            found[name] = options.get("default", spec[0][0] if spec[0] else "")
        elif spec[0] == "COMBO":
            found[name] = options.get("default") or next(iter(options.get("options") or [""]))
        elif spec[0] in ("INT", "FLOAT", "STRING", "BOOLEAN"):
            found[name] = options.get("default")
    return found


def graph_of(host, loader: Loader, name: str, info: dict) -> dict:
    """A graph of the loader and what it needs, whose outputs are kept."""
    node = f"PixStack_{loader.node}"
    graph = {given: GIVEN[given](host) for _, given in loader.inputs}
    links = {key: [given, 0] for key, given in loader.inputs}
    inputs = {**widgets(info, node), **dict(loader.texts), loader.widget: name, **links}
    graph["loader"] = {"class_type": node, "inputs": inputs}
    graph["end"] = {"class_type": "Soak_Taken", "inputs": {"value": ["loader", 0], "name": "loaded"}}
    return graph


def state_of(loaded) -> dict:
    """Weights of a MODEL, CLIP, VAE, CONTROL_NET or guide."""
    patcher = getattr(loaded, "net_patcher", None) or getattr(loaded, "patcher", None) or loaded
    return {key: value.float() for key, value in patcher.model.state_dict().items() if isinstance(value, torch.Tensor)}


def loaded(host, graph: dict, name: str, compare: bool) -> dict | str:
    """Weights of what the graph loads, or the sentence that refused it. Raises Wrong for a bad one."""
    Taken.kept.clear()
    run = host.run(graph, fresh=True)
    if run.error:
        kind, _, said = run.error.message.partition(": ")
        error = {"ValueError": ValueError, "FileNotFoundError": OSError, "OSError": OSError,
                 "MemoryError": MemoryError}.get(kind.split(".")[-1], AssertionError)(said)
        outcome, why = verdict(error)
        if outcome != CLEAN:
            raise Wrong(run.error.message)
        if name not in said:
            raise Wrong(f"the file is not named: {said}")
        return said
    return state_of(Taken.kept["loaded"]) if compare else {}


def of_nodes(host, seed: int, chosen: Callable[[int], bool] = lambda number: True) -> Iterator[Trial]:
    """Every loader of a node with every broken file."""
    register(host)
    info, number = host.object_info(), 0
    for loader in LOADERS:
        name = f"{loader.name}_{loader.node}_broken{loader.suffix}"
        path = host.models / loader.folder / name
        good = path.with_name(name.replace("broken", "good"))
        if not good.exists():
            loader.make(good)
        path.write_bytes(good.read_bytes())
        host._folders.filename_list_cache.clear()
        graph, right = graph_of(host, loader, name, info), {}

        def trial(make, must, loader=loader, path=path, good=good, graph=graph, right=right):
            if loader.values and not right:
                path.write_bytes(good.read_bytes())
                right.update(loaded(host, graph, path.name, True))
            try:
                content = make()
            except (SafetensorError, RuntimeError, UnicodeEncodeError):
                return RECOVERED  # such a file cannot even be written
            path.write_bytes(content)
            state = loaded(host, graph, path.name, loader.values)
            return judged(state, must, right)

        rng = random.Random(seed)
        for kind, what, must, make in broken_files.every(good, rng):
            number += 1
            if chosen(number):
                yield Trial(f"files: {loader.node}", f"{loader.suffix} {kind}: {what}",
                            lambda make=make, must=must, trial=trial: trial(make, must))
        yield Trial(f"files: {loader.node}", "the good file after all the broken ones",
                    lambda trial=trial, good=good: trial(good.read_bytes, broken_files.SAME))


def judged(state: dict | str, must: str, right: dict) -> str:
    """Outcome of a loader that gave weights, or a sentence. right: those of the good file."""
    if isinstance(state, str):
        if must == broken_files.SAME:
            raise Wrong(f"a good file was refused: {state}")
        return CLEAN
    if must == broken_files.REFUSED:
        raise Wrong("loaded, and should have been refused")
    if spoilt := next((key for key, value in state.items() if not value.isfinite().all()
                       and right.get(key, value[:0]).isfinite().all()), None):
        raise Wrong(f"loaded with values in {spoilt} that are no numbers")
    if must == broken_files.SAME and right:
        if state.keys() != right.keys():
            raise Wrong("loaded with other weights than the good file has")
        if other := next((k for k in right if not torch.equal(state[k], right[k])), None):
            raise Wrong(f"loaded with other values in {other} than the good file has")
    return RECOVERED


# --- Files that consist of pictures and texts

def command(*words: str) -> str:
    """Outcome of a command of the trainer. Raises what it lets through."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            main(list(words))
    except SystemExit as ended:
        if ended.code in (0, None):
            return RECOVERED
        if not isinstance(ended.code, str) or not ended.code.startswith("error: "):
            raise Wrong(f"ended with {ended.code!r}") from ended
        outcome, why = verdict(ValueError(ended.code))
        if outcome != CLEAN:
            raise Wrong(why) from ended
        return CLEAN
    return RECOVERED


TEXTS = ("", "{", "[", "nul", "null", "[]", "{}", "[1, 2", '{"image": 1}', '"' * 99, "[" * 100_000, '{"a":' * 100_000,
         "\ufeff", "\x00" * 50, "NaN", "9" * 5000, "a,b\n1", "=", "[[a]]\nb = 1", "a = " + "[" * 50_000,
         "\n" * 1000, "x" * 100_000, "\u2028", "'''", "a = 1979-05-27", "a = nan", "{" * 50 + "}" * 50, "!!python/x")


def broken_texts(good: str, rng: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of a text file as editors, disks and enemies leave it."""
    data = good.encode()
    for text in TEXTS:
        yield f"{text[:20]!r}", text.encode("utf-8", "surrogatepass")
    for encoding in ("utf-8-sig", "utf-16", "utf-32", "latin-1"):
        yield encoding, good.encode(encoding, "replace")
    yield "CRLF", good.replace("\n", "\r\n").encode()
    yield "twice", data + data
    for _ in range(count):
        at = rng.randrange(len(data))
        match rng.randrange(5):
            case 0:
                yield f"cut at {at}", data[:at]
            case 1:
                yield f"bytes at {at}", data[:at] + rng.randbytes(3) + data[at + 3:]
            case 2:
                yield f"{at} left out", data[:at] + data[at + 1:]
            case 3:
                words = good.split('"')
                place = rng.randrange(len(words))
                words[place] = rng.choice(("", "\\ud800", "\x00", "../../etc/passwd", "CON", "x" * 300, "\n", "null"))
                yield f"word {place} is {words[place][:12]!r}", '"'.join(words).encode()
            case 4:
                value = json.dumps(rng.choice(broken_files.VALUES))
                start = good.find(":", at)
                end = min(i for i in (good.find(",", start), good.find("}", start), len(good)) if i >= 0)
                yield f"value at {start} is {value[:20]}", (good[:start + 1] + value + good[end:]).encode()


def row(**entries) -> str:
    return json.dumps({"file": "a.png", "caption": "a red square", **entries}) + "\n"


LISTS = {  # file of a data set -> a good one
    "data.jsonl": row() + row(file="b.png", captions=["one", "two"], split="held_out", width=32, height=32),
    "metadata.jsonl": row(file_name="a.png") + row(file_name="b.png"),
    "metadata.csv": "file_name,text\na.png,a red square\nb.png,a blue square\n",
    "data.json": json.dumps({"a.png": {"caption": "a red square", "tags": "red"}, "b.png": {"caption": "x"}}),
    "captions.txt": "a red square",
    "a.txt": "a red square",
    "a.json": json.dumps({"caption": "a red square", "width": 32}),
}
SMALL_RUN = """steps = 2
batch_size = 2
out = "OUT"
device = "cpu"
[recipe]
name = "pixelflow"
[model]
heads = 2
head_dim = 8
depth = 1
num_stages = 2
[text]
encoder = "small"
vocabulary = 60
width = 16
depth = 1
heads = 2
hidden = 32
max_length = 16
[optimizer]
learning_rate = 0.001
[data]
path = "DATA"
resolution = 16
crop = "none"
"""


def pictures(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (32, 32), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {colour} square")
    return folder


def of_lists(folder: Path, seed: int, count: int) -> Iterator[Trial]:
    """Broken lists and captions of data sets for the doctor, broken settings for its --recipe."""
    for name, good in LISTS.items():
        place = folder / f"list_{name.replace('.', '_')}"

        def trial(content, place=place, name=name):
            pictures(place)
            (place / name).write_bytes(content)
            return command("doctor", str(place / name if name.endswith(("jsonl", "json")) and name != "a.json"
                                         else place))

        for what, content in broken_texts(good, random.Random(seed), count):
            yield Trial(f"texts: {name}", what, lambda content=content, trial=trial: trial(content))
    place = folder / "settings"
    good = SMALL_RUN.replace("OUT", str(folder / "out")).replace("DATA", str(place / "pictures"))

    def settings(content):
        pictures(place / "pictures")
        (place / "run.toml").write_bytes(content)
        return command("doctor", "--recipe", str(place / "run.toml"))

    for what, content in broken_texts(good, random.Random(seed), 3 * count):
        yield Trial("texts: settings", what, lambda content=content: settings(content))


def of_converted(folder: Path, seed: int, chosen: Callable[[int], bool] = lambda number: True) -> Iterator[Trial]:
    """Broken files for `convert`."""
    number = 0
    for name, make in (("pixart.pth", weights.tiny_pixart), ("pixart_emoji.safetensors", weights.tiny_emoji),
                       ("lora.safetensors", weights.tiny_pixart_lora), ("control.pth", weights.tiny_pixart_controlnet),
                       ("guide.pth", cascade_weights.tiny_guide), ("word.pth", cascade_weights.tiny_personalisation)):
        good, path = folder / "good" / name, folder / f"broken_{name}"
        if not good.exists():
            make(good)

        def trial(make, must, path=path):
            target = folder / "converted.safetensors"
            target.unlink(missing_ok=True)
            try:
                path.write_bytes(make())
            except (SafetensorError, RuntimeError, UnicodeEncodeError):
                return RECOVERED
            outcome = command("convert", str(path), str(target), "--to", "original")
            if outcome == CLEAN and (target.exists() or [*folder.glob("*.unfinished")]):
                raise Wrong("refused, and something was written")
            return outcome

        for kind, what, must, make_bytes in broken_files.every(good, random.Random(seed)):
            number += 1
            if chosen(number):
                yield Trial("files: convert", f"{name} {kind}: {what}",
                            lambda make=make_bytes, must=must, trial=trial: trial(make, must))


def of_lora_commands(folder: Path, seed: int, chosen: Callable[[int], bool] = lambda number: True) -> Iterator[Trial]:
    """Broken LoRAs for `lora inspect`, `lora resize` and `lora merge`."""
    good, path, out = (folder / f"lora_{name}.safetensors" for name in ("good", "broken", "out"))
    weights.tiny_pixart_lora(good)
    commands = {"inspect": (str(path),), "resize": (str(path), str(out), "--rank", "2"),
                "merge": (f"{path}=0.5", f"{good}=0.5", "--out", str(out))}
    number = 0
    for name, words in commands.items():
        for kind, what, _, make in broken_files.every(good, random.Random(seed)):
            number += 1
            if chosen(number):
                def run(make=make, name=name, words=words):
                    out.unlink(missing_ok=True)
                    try:
                        path.write_bytes(make())
                    except (SafetensorError, RuntimeError, UnicodeEncodeError):
                        return RECOVERED
                    outcome = command("lora", name, *words)
                    if outcome == CLEAN and (out.exists() or [*folder.glob("*.unfinished")]):
                        raise Wrong("refused, and something was written")
                    return outcome

                yield Trial(f"files: lora {name}", f"{kind}: {what}", run)


OTHERS = {  # settings of other trainers, a file and the one beside it
    "onetrainer.json": json.dumps({
        "__version": 10, "training_method": "LORA", "model_type": "PIXART_SIGMA", "base_model_name": "BASE",
        "concepts": [{"path": "DATA", "text": {"prompt_source": "sample"}, "image": {"enable_random_flip": True}}],
        "learning_rate": 0.0002, "epochs": 3, "batch_size": 2, "resolution": "64", "lora_rank": 12, "seed": 77,
        "optimizer": {"optimizer": "ADAMW", "beta1": 0.9}, "samples": [{"prompt": "a card", "height": 64, "seed": 5}]}),
    "kohya.toml": """
pretrained_model_name_or_path = "BASE"
network_module = "networks.lora"
network_dim = 8
learning_rate = 3e-4
optimizer_type = "AdamW"
optimizer_args = ["weight_decay=0.1", "betas=(0.9, 0.95)"]
max_train_steps = 500
seed = 42
dataset_config = "data.toml"
""",
    "config.json": json.dumps({
        "--model_type": "full", "--model_family": "flux", "--pretrained_model_name_or_path": "BASE",
        "--learning_rate": 1e-5, "--optimizer": "adamw_bf16", "--max_train_steps": 900, "--train_batch_size": 2,
        "--data_backend_config": "multidatabackend.json", "--validation_resolution": "32x32", "--seed": 11}),
    "ai_toolkit.yaml": """
job: extension
config:
  name: my_cards
  process:
    - type: sd_trainer
      network: {type: lora, linear: 6, linear_alpha: 3}
      datasets:
        - {folder_path: DATA, caption_ext: txt, resolution: [64], flip_x: true}
      train: {batch_size: 4, steps: 700, lr: 4e-4, optimizer: adamw, optimizer_params: {weight_decay: 1.0e-4}}
      model: {name_or_path: BASE, arch: flux, quantize: true}
      sample: {sampler: flowmatch, sample_every: 250, width: 64, height: 64, prompts: ["a red card"], seed: 42}
""",
}


def of_imports(folder: Path, seed: int, count: int) -> Iterator[Trial]:
    """Broken settings of other trainers for `import`."""
    place = folder / "others"
    pictures(place / "pictures")
    beside = [{"id": "cards", "type": "local", "instance_data_dir": str(place / "pictures"), "resolution": 32}]
    sets = "\n".join(["[[datasets]]", "resolution = 64", "[[datasets.subsets]]", f"image_dir = '{place / 'pictures'}'",
                      "class_tokens = 'a card'"])
    for name, good in OTHERS.items():
        def trial(content, name=name):
            out = place / "recipe.toml"
            out.unlink(missing_ok=True)
            (place / "multidatabackend.json").write_text(json.dumps(beside))
            (place / "data.toml").write_text(sets)
            (place / name).write_bytes(content)
            outcome = command("import", str(place / name), "--out", str(out))
            if outcome == CLEAN and out.exists():
                raise Wrong("refused, and something was written")
            return outcome

        good = good.replace("DATA", str(place / "pictures")).replace("BASE", str(folder / "PixArt-Sigma.safetensors"))
        for what, content in broken_texts(good, random.Random(seed), count):
            yield Trial(f"texts: {name}", what, lambda content=content, trial=trial: trial(content))


# --- Pictures

def encoded(format: str, rng: random.Random) -> bytes:
    noise = numpy.frombuffer(rng.randbytes(32 * 32 * 3), "uint8").reshape(32, 32, 3)
    Image.fromarray(noise).save(buffer := io.BytesIO(), format)
    return buffer.getvalue()


def of_pictures(host, folder: Path, seed: int, count: int) -> Iterator[Trial]:
    """Broken pictures for Load Data Set Entry and the doctor."""
    register(host)
    rng = random.Random(seed)
    for ending, format in (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"), ("tiff", "TIFF"), ("bmp", "BMP"),
                           ("gif", "GIF")):
        good = encoded(format, rng)
        place = pictures(folder / f"pictures_{ending}")
        entry = host.input / f"soak_{ending}"
        entry.mkdir(parents=True, exist_ok=True)
        (entry / "data.jsonl").write_text(json.dumps({"image": f"x.{ending}", "text": "a"}) + "\n")
        graph = {"load": {"class_type": "PixStack_LoadEntry", "inputs": {"folder": entry.name, "index": 0}},
                 "end": {"class_type": "Soak_Taken", "inputs": {"value": ["load", 0], "name": "loaded"}}}

        def trial(content, place=place, entry=entry, ending=ending, graph=graph):
            for at in (place, entry):
                (at / f"x.{ending}").write_bytes(content)
            said = loaded(host, graph, f"x.{ending}", False)
            if isinstance(said, dict) and not Taken.kept["loaded"].isfinite().all():
                raise Wrong("a picture of values that are no numbers")
            command("doctor", str(place))
            return CLEAN if isinstance(said, str) else RECOVERED

        broken = [(what, content) for what, _, content in broken_files.damaged(good, rng)]
        broken += [(f"bytes at {at}", good[:at] + rng.randbytes(2) + good[at + 2:])
                   for at in (rng.randrange(len(good)) for _ in range(count))]
        for what, content in broken:
            yield Trial(f"pictures: {ending}", what, lambda content=content, trial=trial: trial(content))


def of_poses(host, folder: Path, seed: int, count: int) -> Iterator[Trial]:
    """Broken networks of MediaPipe for Find Poses."""
    register(host)
    goods = {}
    for part, file in pose.FILES.items():
        path = host.models / "annotators" / file.split("/")[-1]
        if not path.exists():
            recorded_pose.write(path, part)
        goods[part] = (path, path.read_bytes())
    graph = {"picture": picture(host), "find": {"class_type": "PixStack_FindPoses", "inputs": {
        **widgets(host.object_info(), "PixStack_FindPoses"), "image": ["picture", 0]}},
        "end": {"class_type": "Soak_Taken", "inputs": {"value": ["find", 0], "name": "loaded"}}}
    rng = random.Random(seed)

    def trial(path, good, content):
        path.write_bytes(content)
        try:
            said = loaded(host, graph, path.name, False)
        finally:
            path.write_bytes(good)
        return CLEAN if isinstance(said, str) else RECOVERED

    for path, good in goods.values():
        broken = [*broken_files.damaged(good, rng)][:count]
        for what, _, content in broken:
            yield Trial("files: FindPoses", f"{path.name} {what}",
                        lambda path=path, good=good, content=content: trial(path, good, content))
