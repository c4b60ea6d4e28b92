"""`python -m trainer cache`."""
from __future__ import annotations

from itertools import chain
from pathlib import Path
from zlib import crc32

from .options import accelerator_of, with_recipe


def add_arguments(one):
    with_recipe(one)
    one.add_argument("--read", action="store_true", help="take over the feature files of a PixArt release")
    one.add_argument("--write", action="store_true", help="write the cache's features as a PixArt release has them")
    one.add_argument("--captions", type=Path, help="with --read or --write: the folder of .npz caption features")
    one.add_argument("--latents", type=Path, help="with --read or --write: the folder of .npy VAE features")


def run(args):
    """Extract the features of frozen encoders once, into cache.folder; run it again to go on."""
    from ..config.check import load

    config = load(args.recipe, args.settings)

    from tqdm import tqdm

    from ..data import wording
    from ..features import cache, precision, released, text_encoders
    from ..recipes import find
    from ..training import build, class_pictures

    if not config.cache.folder:
        raise ValueError("cache.folder is empty: name where the features are to be kept.")
    cache.stop_once()
    accelerator = accelerator_of(config.device)
    precision.set_float32_matmul(config, accelerator.device)
    number, count = accelerator.process_index, accelerator.num_processes
    class_pictures.draw_missing(config, accelerator,
                                lambda groups: tqdm(groups, disable=not accelerator.is_main_process))
    collection, root = build.collection(config), Path(config.cache.folder).expanduser()
    text = text_encoders.frozen(config, config.folder, number) if config.text.frozen else None
    readers = find(config.recipe.name).make_encoders(config, number)
    parts = ((collection.train, config.data), (collection.held_out, config.data.unvaried()))
    taken = {"text": text and text.store if args.captions else None, "captions": args.captions,
             "latent": readers[0].store if readers and args.latents else None, "latents": args.latents}
    if args.captions or args.latents:
        if not args.read and not args.write:
            raise ValueError("--captions and --latents name folders of the release's feature files: say --read or "
                             "--write.")
        for items, settings in parts:
            done = released.read_released(items, settings, **taken) if args.read else \
                released.write_released(items, settings, **taken, limit=config.text.max_length)
            accelerator.print("\n".join(done))
        return
    if text:
        asked = wording.every(collection.train, collection.held_out, config.data, config.seed)
        mine = (c for c in chain(["", *config.samples.captions], asked) if crc32(c.encode()) % count == number)
        text.prepare(mine, accelerator.device, tqdm)
        accelerator.print(f"{text.store.folder}: {len(text.store):,} captions")
    for items, settings in parts if readers else ():
        cache.fill(items, settings, readers, root, accelerator.device, tqdm, (number, count))
    accelerator.wait_for_everyone()
    for reader in readers:
        reader.store.refresh()
        accelerator.print(f"{reader.store.folder}: {len(reader.store):,} pictures")
    accelerator.end_training()
