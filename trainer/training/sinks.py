"""Where numbers and samples of a run go beside its log: tensorboard, and as [log] asks Weights & Biases, trackio and a
webhook."""
from __future__ import annotations

import json
import os
import threading
import urllib.request
import uuid
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from ...models_impl.files import write_whole
from ..config.load import as_dict
from ..config.schema import Config

TIMEOUT = 10  # seconds that a webhook's server has to answer


class Sink(Protocol):
    def numbers(self, step: int, values: dict[str, float]): ...

    def picture(self, step: int, page: Image.Image):
        """The samples of a step."""

    def event(self, step: int, words: str):
        """What a person who is away wants to know: begun, validated, ended, failed."""

    def close(self): ...


def opened(config: Config, folder: Path, step: int) -> list[Sink]:
    """Those that [log] asks for. step: that the run goes on from."""
    found: list[Sink] = [Tensorboard(folder, step)]
    if config.log.wandb:
        found.append(WeightsAndBiases(config, folder))
    if config.log.trackio:
        found.append(Trackio(config))
    if config.log.webhook:
        found.append(Webhook(config))
    return found


class Tensorboard:
    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def numbers(self, step: int, values: dict[str, float]):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, page: Image.Image):
        self.writer.add_image("samples", np.asarray(page), step, dataformats="HWC")

    def event(self, step: int, words: str):
        pass

    def close(self):
        self.writer.close()


class WeightsAndBiases:
    """A run known by a name that stays in the folder. Of steps that are done again, because they came after the last
    checkpoint, the first account stays there; it is the same."""

    def __init__(self, config: Config, folder: Path):
        import wandb

        name = folder / "wandb" / "id"
        if not name.exists():
            name.parent.mkdir(parents=True, exist_ok=True)
            write_whole(name, uuid.uuid4().hex[:12])
        self.image = wandb.Image
        self.run = wandb.init(project=config.log.project, name=config.name, id=name.read_text(encoding="utf-8"),
                              resume="allow", dir=str(folder), mode=config.log.wandb, config=as_dict(config),
                              settings=wandb.Settings(silent=True))

    def numbers(self, step: int, values: dict[str, float]):
        self.run.log(values, step=step)

    def picture(self, step: int, page: Image.Image):
        self.run.log({"samples": self.image(page)}, step=step)

    def event(self, step: int, words: str):
        pass

    def close(self):
        self.run.finish()


class Trackio:
    """The same in trackio, which has Weights & Biases' words and keeps what it gets on this machine."""

    def __init__(self, config: Config):
        import trackio

        self.trackio = trackio
        self.run = trackio.init(project=config.log.project, name=config.name, config=as_dict(config), resume="allow")

    def numbers(self, step: int, values: dict[str, float]):
        self.run.log(values, step=step)

    def picture(self, step: int, page: Image.Image):
        self.run.log({"samples": self.trackio.Image(np.asarray(page))}, step=step)

    def event(self, step: int, words: str):
        pass

    def close(self):
        self.run.finish()


class Webhook:
    """Sentences sent as JSON, by a thread: a server that does not answer delays nothing but the end, by seconds."""

    def __init__(self, config: Config):
        self.name, self.told, self.sending = config.name, False, []
        word = config.log.webhook
        self.address = os.environ[word[1:]] if word.startswith("$") else word

    def numbers(self, step: int, values: dict[str, float]):
        pass

    def picture(self, step: int, page: Image.Image):
        pass

    def event(self, step: int, words: str):
        said = f"{self.name}: {words}"  # Slack reads text, Discord content
        body = json.dumps({"text": said, "content": said, "run": self.name, "step": step}).encode()
        self.sending = [thread for thread in self.sending if thread.is_alive()]
        self.sending.append(threading.Thread(target=self.send, args=(body,), daemon=True))
        self.sending[-1].start()

    def send(self, body: bytes):
        headers = {"Content-Type": "application/json", "User-Agent": "pixstack"}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.address, body, headers), timeout=TIMEOUT):
                pass
        except (OSError, ValueError) as error:  # of a name that is none, an answer that is none, a server that is away
            if not self.told:
                print(f"\nThe webhook did not take a message ({error}); the run goes on.")
            self.told = True

    def close(self):
        for thread in self.sending:
            thread.join(TIMEOUT)
