"""What the settings of single data sets may be: of [data] where it is the only one, or of each [[data.sets]]."""
from __future__ import annotations

from collections import Counter
from pathlib import Path

from .problems import Problems
from .schema import Config, Data, DataSet, SetSettings, look_up

LAYOUTS = {"auto": "either", "jsonl": "a file", "folder": "a folder", "classes": "a folder", "sam": "a folder",
           "data_info": "a file", "webdataset": "either", "datasets": "either", "csv": "a file", "table": "a file",
           "splits": "a folder"}
"""data.kind -> what data.path is then."""
DRAWN_INTO = ("auto", "folder")


def problems(settings: Data) -> list[str]:
    """Everything wrong with the data sets, each named, that shows without looking into a file."""
    found = Problems()
    for number, one in enumerate(settings.sets or settings.each[:1]):
        name = settings.called(number)
        found += of_place(one, name, may_be_absent=one.prior_count > 0)
        found += of_pictures(one, name, settings.buckets)
        found += of_captions(one, name)
        found += of_share(one, name)
    if settings.prior_path and not settings.prior_count:
        found.exists("data.prior_path", settings.prior_path)
    found += between(settings) + of_drawing(settings)
    found.at_least("data.caption_variants", settings.caption_variants, 0)
    return list(dict.fromkeys(found))


def of_place(one: SetSettings, name: str, may_be_absent: bool) -> list[str]:
    found = Problems()
    found.one_of(f"{name}.kind", one.kind, LAYOUTS)
    found.need(one.path, f"{name}.path is empty: name the pictures.")
    if not may_be_absent:
        found.exists(f"{name}.path", one.path)
    found.exists(f"{name}.held_out_path", one.held_out_path)
    path, takes = Path(one.path).expanduser(), LAYOUTS.get(one.kind, "either")
    if one.path and path.exists() and takes != "either":
        found.need(path.is_file() == (takes == "a file"), f"{name}.path={one.path!r} is a "
                   f"{'file' if path.is_file() else 'folder'}, and {name}.kind={one.kind!r} takes {takes}: say "
                   f"{name}.kind=auto, which looks what lies there.")
    return found


def of_pictures(one: SetSettings, name: str, buckets: str) -> list[str]:
    found = Problems()
    found.one_of(f"{name}.crop", one.crop, ("random", "centre", "none"))
    found.need(not (buckets and one.crop == "none"),
               f"{name}.crop='none' takes squares, and data.buckets are of other shapes: use centre or random.")
    for key in ("brightness", "contrast", "saturation", "colour_share", "rotation_share"):
        found.share(f"{name}.{key}", look_up(one, key))
    found.need(0 <= one.hue <= 0.5, f"{name}.hue={one.hue} must be 0 to 0.5, half of the colours' circle.")
    found.need(0 <= one.rotation <= 180, f"{name}.rotation={one.rotation} must be 0 to 180 degrees.")
    return found


def of_captions(one: SetSettings, name: str) -> list[str]:
    found = Problems()
    for key in ("tag_share", "template_share", "described_share", "tag_dropout"):
        found.share(f"{name}.{key}", look_up(one, key))
    found.at_least(f"{name}.keep_tags", one.keep_tags, 0)
    found.need(all("{}" in t for t in one.templates),
               f"{name}.templates: each one needs a {{}} where the caption goes.")
    return found


def of_share(one: DataSet, name: str) -> list[str]:
    found = Problems()
    found.at_least(f"{name}.repeats", one.repeats, 1)
    found.at_least(f"{name}.weight", one.weight, 0)
    found.at_least(f"{name}.loss_weight", one.loss_weight, 0)
    found.at_least(f"{name}.prior_count", one.prior_count, 0)
    found.need(one.prior or not one.prior_count,
               f"{name}.prior_count={one.prior_count} is for a set of class pictures: {name}.prior=true.")
    found.need(not one.weight or one.repeats == 1, f"{name}.weight={one.weight} says how often the set is shown, and "
                                                   f"{name}.repeats={one.repeats} too: leave one of them out.")
    return found


def between(settings: Data) -> list[str]:
    """What sets are to each other."""
    found, sets = Problems(), settings.sets
    if not sets:
        return found
    for key in ("path", "held_out_path"):
        found.need(not look_up(settings, key), f"data.{key}={look_up(settings, key)!r} is for a single set, and "
                                               f"data.sets are several: take it out, or name it in data.sets.1.{key}.")
    found.need(not all(one.prior for one in sets), "data.sets are all prior=true: none has pictures to learn.")
    for prior, which in ((False, "others"), (True, "other prior sets")):
        some = [n for n, one in enumerate(sets) if one.prior == prior]
        lacking = [f"{settings.called(n)}.weight" for n in some if not sets[n].weight]
        found.need(len(lacking) in (0, len(some)),
                   f"{', '.join(lacking)}: there is none, and {which} have a weight. Give all of them one, or none.")
    twice = [name for name, count in Counter(one.name for one in sets if one.name).items() if count > 1]
    found.need(not twice, f"data.sets have one name twice: {', '.join(twice)}.")
    for number, one in enumerate(sets):
        found.need(all(c.isalnum() or c in "_-." for c in one.name),
                   f"{settings.called(number)}.name={one.name!r} has other signs than letters, digits and _-. in it.")
    return found


def of_drawing(settings: Data) -> list[str]:
    """Problems with class pictures that are to be drawn."""
    found = Problems()
    found.at_least("data.prior_count", settings.prior_count, 0)
    for number, one in enumerate(settings.each):
        if not (one.prior and one.prior_count):
            continue
        ours = number >= len(settings.sets)
        path, caption = ("data.prior_path", "data.prior_caption") if ours else (
            f"{settings.called(number)}.path", f"{settings.called(number)}.caption")
        found.need(one.caption, f"{caption} is empty: say what the class pictures show that are to be drawn.")
        found.need(one.kind in DRAWN_INTO and not Path(one.path).expanduser().is_file(),
                   f"{path}={one.path!r}: class pictures are drawn into a folder of pictures.")
    return found


def of_run(config: Config) -> list[str]:
    """What data sets are to the rest of the settings."""
    found, data, recipe = Problems(), config.data, config.recipe
    for number, one in enumerate(data.each):
        name = data.called(number)
        changing = [f"{name}.{key}={value}" for key, value in one.rewords.items()]
        found.need(not (config.text.frozen and changing) or data.caption_variants,
                   f"{', '.join(changing)} makes other captions at every step, and the embeddings of a frozen encoder "
                   "are made once, before training: set data.caption_variants=10 for ten wordings of each picture's; "
                   "or set it to 0 and write such captions into the data, or let an encoder learn.")
        varied = [f"{name}.{key}={value}" for key, value in one.varies.items()]
        found.need(not (varied and config.cache.folder and "vae" in recipe.sections),
                   f"{', '.join(varied)} makes another picture every time, and cache.folder={config.cache.folder!r} "
                   "has what encoders made of each once: leave one of them out (text.cache keeps what they make of "
                   "captions).")
        found.need(not (one.prior and one.prior_count) or recipe.draws_class_pictures,
                   f"prior_count={one.prior_count}: recipe.name={recipe.name!r} cannot draw class pictures before it "
                   "has learned. Draw them with another program, or with recipe.name='pixart_dreambooth'.")
        found.need(not (one.prior and one.prior_count) or config.text.encoder,
                   f"prior_count={one.prior_count}: class pictures are drawn from a caption, and there is no "
                   "text.encoder.")
    return list(dict.fromkeys(found))
