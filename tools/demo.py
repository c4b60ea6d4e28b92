"""`make demo`: what the embedded models draw, on one page for a browser and in one picture."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from .comfyui import ROOT
from .demo_page import Chapter, Tile, page, sheet
from .host import Host, Run
from .workflow import node_named, read, set_inputs, shipped

SEED = 1
TITLE = "Drawn here by PixStack"
ABOUT = (
    "{count} pictures in {seconds:.0f} seconds, loading included, by the small models that come with PixStack. Nothing "
    "was downloaded for them, and emoji are all that they have seen. Each section names its template, which is in "
    "ComfyUI's Workflow > Browse Templates > pixstack. It draws the same with the prompt, seed and settings below a "
    "picture, one at a time."
)


@dataclass(frozen=True)
class View:
    """Pictures that a node of the template shows."""

    node: str = "SaveImage"
    """Its title, its class or its id: whichever only one node has."""
    captions: tuple[str, ...] = ("",)
    """What to say about each picture, beside the prompt if it was drawn."""
    output: int | None = None
    """Slot of the pictures, of a node that shows none itself."""
    drawn: bool = True
    """Not a hint or a map."""


@dataclass(frozen=True)
class Drawing:
    """One run of a section's template."""

    prompt: str
    views: tuple[View, ...] = (View(),)
    settings: tuple[str, ...] = ()
    """NODE.input=value, as for `comfy_host.py run --set`."""


@dataclass(frozen=True)
class Section:
    family: str
    headline: str
    sentence: str
    template: str
    """Short name of a shipped workflow."""
    drawings: tuple[Drawing, ...]
    asks: str = "Prompt.text"
    """NODE.input of the template that takes what to draw."""


def drawings(*prompts: str, views: tuple[View, ...] = (View(),)) -> tuple[Drawing, ...]:
    return tuple(Drawing(prompt, views) for prompt in prompts)


def hint(node: str, caption: str, output: int | None = 0) -> View:
    return View(node, (caption,), output, drawn=False)


def redrawn(first: str, then: str) -> Drawing:
    return Drawing(first, (View("9", ("first",)), View("14", (f"then {then}",))),
                   (f"Prompt for the new picture.text={then}",))


def enlarged(picture: str, prompt: str) -> Drawing:
    return Drawing(prompt, (hint("A mushroom", "a picture"), hint("Enlarged to 64, blurred", "32 pixels of it"),
                            View("VAEDecode", output=0)), (f"A mushroom.picture={picture}",))


def over(title: str, name: str, *prompts: str) -> tuple[Drawing, ...]:
    """PixArt's drawings over an example picture, which is shown once. title: of its node."""
    return tuple(Drawing(prompt, (*(() if i else (hint(title, name),)), View()), ("RepeatLatentBatch.amount=1",))
                 for i, prompt in enumerate(prompts))


def along(picture: str, name: str, prompt: str) -> tuple[Drawing, Drawing]:
    """With the soft edges of an example picture, and without."""
    edges = hint("PreviewImage", f"edges of a {name}", None)
    return (Drawing(prompt, (edges, View()), (f"PixStack_ExamplePicture.picture={picture}_hed",)),
            Drawing(prompt, (View(captions=("strength 0: no edges",)),), ("ControlNetApplyAdvanced.strength=0",)))


# Sections of a family are next to each other, for its model stays loaded. Its first one draws a person's prompts.
SECTIONS = (
    Section("pixelflow", "PixelFlow: text to picture without a VAE",
            "Pixels from beginning to end: the latent is the picture. 64 pixels, enlarged by 4 to look at them.",
            "pixelflow_text_to_image",
            drawings("red apple", "red heart", "blue car", "pizza", "sun", "rocket")),
    Section("pixelflow", "PixelFlow, from coarse to fine",
            "The film strip of PixelFlow Sample: the picture after each of its stages, at 16, 32 and 64 pixels.",
            "pixelflow_text_to_image",
            drawings("house", "smiling cat face", views=(View("PixStack_PixelFlowSample", output=1),))),
    Section("pixelflow", "PixelFlow: picture to picture",
            "The second picture begins with the first instead of noise: the shape stays, the prompt is another.",
            "pixelflow_image_to_image",
            (redrawn("red apple", "green apple"), redrawn("blue car", "taxi"), redrawn("red heart", "green heart"))),
    Section("pixelflow", "PixelFlow as an upscaler",
            "A picture of 32 pixels is enlarged to 64, which blurs it. The last stage alone brings its edges back.",
            "pixelflow_upscale",
            (enlarged("mushroom", "mushroom"), enlarged("cat_face", "cat face"))),
    Section("pixelflow", "PixelFlow by classes",
            "A second PixelFlow knows no words, only 99 kinds of emoji. Another seed draws another one of the kind.",
            "pixelflow_emoji_classes",
            drawings("face-smiling", "cat-face", "monkey-face", "heart", "time", "transport-water"),
            asks="Kinds of emoji.classes"),
    Section("pixart", "PixArt: text to picture at 128 pixels",
            "PixArt-alpha's network with 4.5 million parameters, and a small VAE behind it.",
            "pixart_emoji",
            drawings("red apple", "red heart", "blue car", "pizza", "rainbow", "flag of japan")),
    Section("pixart", "PixArt: inpainting",
            "The flower is painted over with a mask and drawn anew; the stem stays as it is.",
            "pixart_emoji_inpaint",
            over("A rose", "a rose", "sunflower", "tulip")),
    Section("pixart", "A LoRA: off, half, full",
            "One seed at three strengths. The LoRA was trained on three-dimensional emoji, the model on flat ones.",
            "pixart_emoji_lora",
            drawings("red apple", "green apple", views=(View(captions=("strength 0", "strength 0.5", "strength 1")),))),
    Section("pixart", "A ControlNet: draw along soft edges",
            "The prompt says what to draw, the edges say where. Without them the same seed draws something else.",
            "pixart_emoji_controlnet",
            (*along("mushroom", "mushroom", "red heart"), *along("cat_face", "cat's face", "green apple"))),
    Section("pixart", "PixArt: picture to picture",
            "It begins with a lion in half of the noise, and keeps its place and its colours.",
            "pixart_emoji_image_to_image",
            (Drawing("cat face", (hint("A lion", "a lion"), View()), ("Four of it.amount=1",)),)),
    Section("pixelponder", "PixelPonder: two hints in one picture",
            "Thin and soft edges compete for every patch of 16 pixels. The map shows which of them was selected.",
            "pixelponder_emoji",
            (Drawing("red heart", (hint("A lion", "a cat's face"), hint("PixStack_CannyEdges", "its thin edges"),
                                   hint("Its soft edges", "its soft edges"),
                                   hint("PreviewImage", "the map", None), View()),
                     ("A lion.picture=cat_face", "Its soft edges.picture=cat_face_hed")),)),
    Section("pixelponder", "PixelPonder by regions",
            "Painted by the brush: the left half follows a lion, the right half a cat's face.",
            "pixelponder_emoji_regions",
            drawings("cat face", views=(hint("Soft edges of a lion", "left half"),
                                        hint("PixStack_CannyEdges", "right half"),
                                        hint("PreviewImage", "the map", None), View()))),
)  # fmt: skip
FAMILIES = tuple(dict.fromkeys(section.family for section in SECTIONS))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "demo")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--family", choices=FAMILIES, help="draw what this one can do")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="drawn instead of what the demo has")
    args = parser.parse_args(arguments)

    host = Host(output=args.output).start()
    info, templates = host.object_info(), shipped()
    chapters, seconds, failed = [], 0.0, False
    for section in chosen(args.family, args.prompts):
        path = templates[section.template]
        chapter = Chapter(section.headline, section.sentence, f"Template {path.stem}")
        chapters.append(chapter)
        for drawing in section.drawings:
            name = f"{section.headline}: {drawing.prompt}"
            graph, shown = asked(read(path, info), drawing, args.seed, info, section.asks)
            run = host.run(graph, fresh=False)  # models stay loaded
            if run.error:
                failed = True
                chapter.failures.append(f"{drawing.prompt} was not drawn: {run.error}")
                print(f"error: {name}: {run.error}", file=sys.stderr, flush=True)
                continue
            chapter.tiles += tiles(run, shown, drawing, args.seed)
            seconds += run.seconds
            print(f"{run.seconds:5.1f} s  {name}", flush=True)
    count = sum(tile.drawn for chapter in chapters for tile in chapter.tiles)
    print(f"{count} pictures in {seconds:.1f} s, loading included. All on one page, and as one picture:")
    print(*saved(args.output.resolve(), ABOUT.format(count=count, seconds=seconds), chapters), sep="\n")
    return 1 if failed else 0


def chosen(family: str | None, prompts: list[str]) -> list[Section]:
    """Sections of a family, or of all. With prompts only the first of each family, which draws those instead."""
    sections = [section for section in SECTIONS if family in (None, section.family)]
    if not prompts:
        return sections
    first = {section.family: section for section in reversed(sections)}
    return [replace(section, drawings=tuple(replace(section.drawings[0], prompt=prompt) for prompt in prompts))
            for section in sections if first[section.family] is section]


def asked(graph: dict, drawing: Drawing, seed: int, info: dict, asks: str = Section.asks) -> tuple[dict, list[str]]:
    """(a template's graph that makes a drawing, ids of the nodes that show its views). asks: as a Section has it."""
    graph = set_inputs(graph, [f"{asks}={drawing.prompt}", *drawing.settings], info)
    for inputs in [node["inputs"] for node in graph.values()]:
        if "batch_size" in inputs:
            inputs["batch_size"] = 1
        if "filename_prefix" in inputs:
            inputs["filename_prefix"] = "".join(c if c.isalnum() else "_" for c in drawing.prompt)
        for name in {"seed", "noise_seed"} & inputs.keys():
            if isinstance(inputs[name], list):
                graph[inputs[name][0]]["inputs"]["value"] = seed
            else:
                inputs[name] = seed
    shown = [node_named(view.node, graph, "a view") for view in drawing.views]
    for i, view in enumerate(drawing.views):
        if view.output is not None:
            source, shown[i] = shown[i], f"view {i}"
            graph[shown[i]] = {"class_type": "PreviewImage", "inputs": {"images": [source, view.output]}}
    return graph, shown


def tiles(run: Run, shown: list[str], drawing: Drawing, seed: int) -> list[Tile]:
    """The pictures that a run shows, with captions."""
    count = sum(len(view.captions) for view in drawing.views if view.drawn)
    cost = f"seed {seed}, {run.seconds:.1f} s" + (f" for {count}" if count > 1 else "")
    made = []
    for node, view in zip(shown, drawing.views, strict=True):
        for file, caption in zip(run.pictures[node], view.captions, strict=True):
            lines = (drawing.prompt, caption, cost) if view.drawn else (caption,)
            made.append(Tile(Image.open(file).convert("RGB"), tuple(filter(None, lines)), view.drawn))
    return made


def saved(folder: Path, about: str, chapters: list[Chapter]) -> tuple[Path, Path]:
    """Files of the page and of its picture."""
    folder.mkdir(parents=True, exist_ok=True)
    html, png = folder / "demo.html", folder / "demo.png"
    html.write_text(page(TITLE, about, chapters), encoding="utf-8")
    sheet(TITLE, about, chapters).save(png)
    return html, png


if __name__ == "__main__":
    sys.exit(main())
