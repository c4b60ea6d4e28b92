"""Every file to download, in one table (web/model_files.json), and what is written from it.

    python -m pixstack.tools.model_files

writes from the table: `properties.models` of the loaders in workflows/ and the numbered list under "Download first" in
their notes; the lists between `<!-- model files ... -->` and `<!-- end -->` in help pages and READMEs; MODELS.md. Run
it after the table, a loader's file in a workflow or such a list has changed; a test compares.

The table has a row for each file. `bytes` are as the hub prints them, three digits, where no exact number was seen;
null was not seen, nor were a `licence` and a `gated` of null. `seen` says where file and size were seen. `instead_of`
names the row that it can stand in for, `short` says how, and puts it beside that row in the notes. With `page` the
`url` is that of a repository whose file names were not seen.
"""
from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "web" / "model_files.json"
LISTED = ROOT / "MODELS.md"
DOCS = ROOT / "web" / "docs"
HUB = "https://huggingface.co/"
FAMILIES = {
    "pixart": "PixArt", "pixelflow": "PixelFlow", "pixelponder": "PixelPonder and FLUX.1 [dev]",
    "ultrapixel": "UltraPixel and Stable Cascade", "annotators": "Annotators", "trainer": "The trainer's folders",
}  # fmt: skip
LOADERS = {  # node -> (its name, the folder of models/ where it looks); its first widgets name its files
    "PixStack_PixArtLoader": ("Load PixArt Model", "diffusion_models"),
    "PixStack_PixArtControlNetLoader": ("Load PixArt ControlNet", "controlnet"),
    "PixStack_PixArtLoraLoader": ("Load PixArt LoRA", "loras"),
    "PixStack_ConsistencyDecoderLoader": ("Load Consistency Decoder", "vae"),
    "PixStack_PixelFlowLoader": ("Load PixelFlow Model", "diffusion_models"),
    "PixStack_PixelFlowTextEncoderLoader": ("Load T5 Text Encoder", "text_encoders"),
    "PixStack_FluxLoader": ("Load Small FLUX Model", "diffusion_models"),
    "PixStack_PixelPonderLoader": ("Load PixelPonder", "controlnet"),
    "PixStack_CascadeLoader": ("Load Small Stable Cascade Model", "diffusion_models"),
    "PixStack_UltraPixelGuideLoader": ("Load UltraPixel Guide", "model_patches"),
    "PixStack_UltraPixelPersonalise": ("UltraPixel Personalise", "loras"),
    "PixStack_UltraPixelStageALoader": ("Load UltraPixel Stage A", "vae"),
    "PixStack_HEDEdges": ("HED Edges", "annotators"),
    "PixStack_DepthMap": ("Depth Map", "annotators"),
    "PixStack_FindPoses": ("Find Poses", "annotators"),
    "UNETLoader": ("core's Load Diffusion Model", "diffusion_models"),
    "LoraLoaderModelOnly": ("core's LoraLoaderModelOnly", "loras"),
    "CLIPLoader": ("core's Load CLIP", "text_encoders"),
    "DualCLIPLoader": ("core's DualCLIPLoader", "text_encoders"),
    "VAELoader": ("core's Load VAE", "vae"),
    "ControlNetLoader": ("core's Load ControlNet Model", "controlnet"),
}
SEVERAL = {"DualCLIPLoader": 2}  # files of a loader; the others have one, or a folder of them
WITHOUT_FILE = {"PixStack_FindPoses"}  # no widget names theirs
NON_COMMERCIAL = {"flux-1-dev-non-commercial", "stable-cascade-nc-community", "cc-by-nc-4.0"}
WORDS = {  # of the lists in help pages, by language
    "en": {"saved": "saved as", "into": "in", "of": "a file of", "gated": "login needed", "licence": "licence {}",
           "unknown": "licence not stated", "instead": "in place of", "nc": "non-commercial", "or": "Or ",
           "with": "loads with ", "stop": ". ", "comma": ", ", "colon": ": "},
    "zh": {"saved": "保存为", "into": "放入", "of": "文件来自", "gated": "需要登录", "licence": "许可证 {}",
           "unknown": "未注明许可证", "instead": "代替", "nc": "非商业", "or": "或 ",
           "with": "加载节点：", "stop": "。", "comma": "，", "colon": "："},
}  # fmt: skip


@dataclass(frozen=True)
class ModelFile:
    family: str
    name: str
    """As it lies in its folder, under whose name workflows look for it."""
    folder: str
    """Folder in models/ where it belongs."""
    loaders: tuple[str, ...]
    about: str
    zh: str
    """`about` in Chinese."""
    seen: str
    url: str = ""
    bytes: int | None = None
    licence: str | None = None
    gated: bool | None = None
    instead_of: str = ""
    short: str = ""
    page: bool = False
    command: str = ""
    """What fetches it where it has no address of its own."""

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"{self.name}: {self.family} is not one of {', '.join(FAMILIES)}")
        if bool(self.url) == bool(self.command) or self.url and not self.url.startswith(HUB):
            raise ValueError(f"{self.name}: wants an address under {HUB}, or a command in its place")
        if self.page == ("/resolve/" in self.url) and not self.command:
            raise ValueError(f"{self.name}: {self.url} is " + ("a file, not a page" if self.page else "not a file"))
        if self.bytes is not None and self.bytes < 1e5:
            raise ValueError(f"{self.name}: {self.bytes} bytes are too few for weights")

    @property
    def basename(self) -> str:
        """What the browser saves it as."""
        return unquote(self.url.rsplit("/", 1)[1])

    @property
    def repository(self) -> str:
        return "/".join(self.url.removeprefix(HUB).split("/")[:2])

    @property
    def size(self) -> str:
        """In words, as the hub has it; empty where it was not seen."""
        if self.bytes is None:
            return ""
        return f"{self.bytes / 1e9:.3g} GB" if self.bytes >= 1e9 else f"{self.bytes / 1e6:.3g} MB"

    def link(self, text: str = "") -> str:
        return f"[{text or (self.repository if self.page else self.basename)}]({self.url})"


def read(path: Path = TABLE) -> list[ModelFile]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [ModelFile(**{**row, "loaders": tuple(row["loaders"]), "url": row.get("url") or ""}) for row in rows]


def first_choice(files: list[ModelFile]) -> dict[tuple[str, str], ModelFile]:
    """(folder, name) -> its row; where several have the name, the one that the others are in place of."""
    return {(f.folder, f.name): f for f in files if f.instead_of != f.name}


def nodes_of(graph: dict) -> list[dict]:
    """All nodes of a workflow, those inside subgraphs too."""
    inner = graph.get("definitions", {}).get("subgraphs", [])
    return [*graph["nodes"], *(node for subgraph in inner for node in subgraph["nodes"])]


def named(node: dict) -> list[tuple[str, str]]:
    """(folder, name) of every file that a loader's widgets name."""
    if node["type"] not in LOADERS or node["type"] in WITHOUT_FILE:
        return []
    values = node.get("widgets_values") or []
    return [(LOADERS[node["type"]][1], value) for value in values[: SEVERAL.get(node["type"], 1)]]


def wanted(node: dict, files: list[ModelFile]) -> list[ModelFile]:
    """The rows of what a loader names; all of a folder's where it names a folder."""
    rows, known = [], first_choice(files)
    for folder, name in named(node):
        inside = [f for (where, at), f in known.items()
                  if where == folder and at.startswith(f"{name}/") and not f.instead_of]
        rows += [known[folder, name]] if (folder, name) in known else sorted(inside, key=files.index)
    return rows


def in_dialog(file: ModelFile) -> bool:
    """Whether the browser's dialog of missing models can tell that it is there: it compares names as they are listed,
    which have backslashes on Windows, and saves a file of a folder outside of it."""
    return not file.page and "/" not in file.name


def in_workflow(graph: dict, files: list[ModelFile]) -> dict:
    """A workflow with its loaders' `properties.models` and the list in its note as the table has them."""
    graph, used = json.loads(json.dumps(graph)), []
    for node in nodes_of(graph):
        rows = wanted(node, files)
        used += [row for row in rows if row not in used]
        models = [{"name": f.name, "url": f.url, "directory": f.folder} for f in rows if in_dialog(f)]
        properties = node.setdefault("properties", {})
        if models:
            properties["models"] = models
        elif node["type"] in LOADERS:
            properties.pop("models", None)
    for node in graph["nodes"]:
        if node["type"] == "MarkdownNote" and DOWNLOAD.search(node["widgets_values"][0]):
            text = DOWNLOAD.sub(lambda block: in_note(used, files, block[1]), node["widgets_values"][0])
            node["widgets_values"][0] = text.rstrip("\n")
    return graph


DOWNLOAD = re.compile(r"\*\*Download first[^\n]*\n\n((?:\d+\. [^\n]*(?:\n|$))+)")


def in_note(used: list[ModelFile], files: list[ModelFile], before: str) -> str:
    """The list of a note. before: the old one, whose lines without a link to the hub are kept at its end."""
    groups = [list(group) for _, group in groupby(used, lambda f: f.folder + "/" + f.name.rpartition("/")[0])]
    lines = [line for group in groups for line in ([folder_line(group)] if "/" in group[0].name else
                                                   [note_line(f, files) for f in group])]
    own = (line.partition(". ")[2] for line in before.splitlines())
    lines += [line for line in own if line and HUB not in line]
    total = sum(f.bytes or 0 for f in used)
    more = "more than " if any(f.page and not f.bytes for f in used) else ""
    size = f"{total / 1e9:.3g} GB" if total >= 1e9 else f"{total / 1e6:.3g} MB"
    head = f"**Download first: {more}{size}.** Press R when the files are in place."
    return head + "\n\n" + "".join(f"{i}. {line}\n" for i, line in enumerate(lines, 1))


def note_line(file: ModelFile, files: list[ModelFile]) -> str:
    others = [f"{f.link(f.short)} {f.size}" for f in files if f.instead_of == file.name and f.short]
    facts = [file.size, *terms(file, "en"), *(f"or {other}" for other in others)]
    return f"{place(file, 'en')}{facts_of(facts)}: {file.about}"


def folder_line(group: list[ModelFile]) -> str:
    links = ", ".join(file.link() for file in group)
    facts = [next((f.size for f in group if f.bytes), ""), *terms(group[0], "en")]
    return f"{links} in `models/{group[0].folder}/{group[0].name.rpartition('/')[0]}`{facts_of(facts)}"


def facts_of(facts: list[str]) -> str:
    facts = [fact for fact in facts if fact]
    return f" ({', '.join(facts)})" if facts else ""


def place(file: ModelFile, language: str) -> str:
    """A file's link and where it goes."""
    words = WORDS[language]
    if file.page:
        return f"{words['of']} {file.link()} {words['saved']} `models/{file.folder}/{file.name}`"
    if file.basename == file.name:
        return f"{file.link()} {words['into']} `models/{file.folder}`"
    return f"{file.link()} {words['saved']} `models/{file.folder}/{file.name}`"


def terms(file: ModelFile, language: str) -> list[str]:
    """What somebody must know before the download."""
    words = WORDS[language]
    return [word for word, holds in ((words["nc"], file.licence in NON_COMMERCIAL),
                                     (words["gated"], file.gated)) if holds]


def in_help(files: list[ModelFile], language: str, loaders: bool = False) -> str:
    """A help page's list, what stands in for a file in that file's line. loaders: say what loads each."""
    words, lines = WORDS[language], []
    names = {file.name for file in files}
    for file in files:
        if file.instead_of in names:
            continue
        about = _about(file, language)
        if file.instead_of:
            about += f"{words['comma']}{words['instead']} `{file.instead_of}`"
        facts = _facts(file, language)
        if loaders:
            facts.append(words["with"] + " / ".join(LOADERS.get(one, (one,))[0] for one in file.loaders))
        line = (f"- **{file.name}**{words['colon']}{about}{words['stop']}{words['comma'].join(facts)}{words['stop']}"
                + _place(file, language))
        for other in (f for f in files if f.instead_of == file.name):
            about = words["comma"].join([_about(other, language), *_facts(other, language)])
            line += f"{words['stop']}{words['or']}{_place(other, language)}{words['colon']}{about}"
        lines.append(line)
    return "\n".join(lines)


def _about(file: ModelFile, language: str) -> str:
    return file.about if language == "en" else file.zh


def _place(file: ModelFile, language: str) -> str:
    return f"`{file.command}`" if file.command else place(file, language)


def _facts(file: ModelFile, language: str) -> list[str]:
    words = WORDS[language]
    licence = words["licence"].format(file.licence) if file.licence else words["unknown"]
    return [fact for fact in (file.size, licence, *terms(file, language)) if fact]


def as_table(files: list[ModelFile]) -> str:
    rows = ["| file | what it is | size | licence | goes into | loaded by |", "|---|---|---|---|---|---|"]
    for f in files:
        name = f.link(f.name) if f.url else f"{f.name}: `{f.command}`"
        if f.page and f.folder:
            name += ", a repository"
        elif f.url and not f.page and f.basename != f.name.rpartition("/")[2]:
            name += ", saved under this name"
        about = f.about + (f"; in place of {f.instead_of}" if f.instead_of and f.instead_of != f.name else "")
        licence = (f.licence or "not stated") + {True: "; **gated: login and acceptance**", None: "; gating not known",
                                                 False: ""}[f.gated]
        loaders = ", ".join(LOADERS.get(loader, (loader,))[0] for loader in f.loaders)
        where = f"`{f.folder}`" if f.folder else "any"
        rows.append(f"| {name} | {about} | {f.size or 'not known'} | {licence} | {where} | {loaders} |")
    return "\n".join(rows)


def listed(files: list[ModelFile]) -> str:
    """MODELS.md."""
    parts = ["# Files to download", "Written from [web/model_files.json](web/model_files.json) by `python -m "
             "pixstack.tools.model_files`: change it there.", "Folders are those of ComfyUI's `models/`. Sizes and "
             "licences are those of the hub's pages; *not known* was not to be seen there. PixStack downloads nothing "
             "by itself, and the small models in `assets/` need nothing of this list."]
    for family, title in FAMILIES.items():
        parts += [f"## {title}", as_table([f for f in files if f.family == family])]
    return "\n\n".join(parts) + "\n"


BLOCK = re.compile(r"(<!-- model files ?(\w*) -->\n).*?(<!-- end -->)", re.DOTALL)


def in_page(text: str, path: Path, files: list[ModelFile]) -> str:
    """A page with what is between its marks written anew: its node's files, or a family's; lists in help pages, whose
    panel is narrow, and tables elsewhere."""
    language = "zh" if path.stem == "zh" else "en"
    node = path.parent.name if path.parent.name.startswith("PixStack_") else path.stem

    def block(match: re.Match) -> str:
        rows = [f for f in files if (f.family == match[2] if match[2] else node in f.loaders)]
        content = in_help(rows, language, bool(match[2])) if path.is_relative_to(DOCS) else as_table(rows)
        return f"{match[1]}{content}\n{match[3]}"

    return BLOCK.sub(block, text)


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "trainer" / "README.md", *sorted(DOCS.rglob("*.md"))]


def written(files: list[ModelFile]) -> dict[Path, tuple[str, str]]:
    """Every file that the table is written into -> (what it holds, what it should)."""
    found = {LISTED: (LISTED.read_text(encoding="utf-8") if LISTED.exists() else "", listed(files))}
    for path in pages():
        text = path.read_text(encoding="utf-8")
        found[path] = text, in_page(text, path, files)
    for path in sorted((ROOT / "workflows").glob("*.json")):
        text = path.read_text(encoding="utf-8")
        graph = json.loads(text)
        made = in_workflow(graph, files)
        found[path] = text, text if made == graph else json.dumps(made, indent=1, ensure_ascii=False) + "\n"
    return found


def main() -> int:
    for path, (before, after) in written(read()).items():
        if before != after:
            path.write_text(after, encoding="utf-8")
            print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
