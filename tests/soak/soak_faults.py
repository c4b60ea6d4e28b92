"""Interrupts, missing memory and other errors in the middle of a picture, and families one after another: the next
picture is always the right one."""
from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import soak_graphs
import torch
from torch.nn import functional
from trials import RECOVERED, Trial, Wrong

CALLS = ("linear", "conv2d", "scaled_dot_product_attention", "group_norm", "layer_norm")


class Injected(RuntimeError):
    pass


@contextmanager
def failing(at: int, error: Exception | None):
    """Block in which the call number `at` of torch's operators raises an error. Gives a list that counts them."""
    count, before = [0], {name: getattr(functional, name) for name in CALLS}

    def counted(call):
        def run(*args, **kwargs):
            count[0] += 1
            if count[0] == at and error is not None:
                raise error
            return call(*args, **kwargs)
        return run

    for name, call in before.items():
        setattr(functional, name, counted(call))
    try:
        yield count
    finally:
        for name, call in before.items():
            setattr(functional, name, call)


def drawn(host, graph: dict, fresh: bool = True, on_event=None):
    run = host.run(graph, on_event, fresh=fresh)
    return run, soak_graphs.pictures_of(run)


class Faults:
    """What happens to one workflow, and the picture that it must draw afterwards."""

    def __init__(self, host, name: str, graph: dict):
        self.host, self.name, self.graph = host, name, graph
        self.right = None
        self.steps = self.calls = 0

    def prepare(self):
        if self.right is None:
            with failing(0, None) as count:
                run, self.right = drawn(self.host, self.graph)
            if run.error or not run.images:
                raise Wrong(f"does not draw: {run.error}")
            self.calls, self.steps = count[0], sum(event == "progress" for event, _ in run.events)

    def again(self, fresh: bool) -> str:
        run, digest = drawn(self.host, self.graph, fresh)
        if run.error:
            raise Wrong(f"the next run fails: {run.error}")
        if digest != self.right and (fresh or digest - self.right):  # what came from the cache is not told again
            raise Wrong("the next picture is another one")
        return RECOVERED

    def interrupted(self, share: float, fresh: bool) -> str:
        self.prepare()
        left = [max(1, int(share * self.steps))]

        def stop(event, data):
            left[0] -= event == "progress"
            if left[0] == 0:
                self.host.interrupt()

        self.host._executor.reset()
        run, _ = drawn(self.host, self.graph, True, stop)
        if run.error and run.error.message != "interrupted":
            raise Wrong(f"an interrupt gives {run.error}")
        return self.again(fresh)

    def failed(self, share: float, error: Exception, fresh: bool) -> str:
        self.prepare()
        with failing(max(1, int(share * self.calls)), error):
            run, digest = drawn(self.host, self.graph)
        if not run.error and digest != self.right:
            if not isinstance(error, torch.OutOfMemoryError):
                raise Wrong("an error was lost, and the picture is another one")
            fresh = True  # core decoded in tiles, and keeps that picture
        return self.again(fresh)


def trials(host, workflows: list[tuple[str, dict]], seed: int, rounds: int,
           chosen: Callable[[int], bool] = lambda number: True) -> Iterator[Trial]:
    soak_graphs.register(host)
    rng, number = random.Random(seed), 0
    every = [Faults(host, name, graph) for name, graph in workflows]
    for _ in range(rounds):
        for one in every:
            share, fresh = rng.random(), rng.random() < 0.5
            for kind, run in (
                ("interrupts", lambda one=one, share=share, fresh=fresh: one.interrupted(share, fresh)),
                ("no memory", lambda one=one, share=share, fresh=fresh: one.failed(
                    share, torch.OutOfMemoryError("injected: no memory left"), fresh)),
                ("other errors", lambda one=one, share=share, fresh=fresh: one.failed(
                    share, Injected("injected"), fresh)),
            ):
                number += 1
                if chosen(number):
                    yield Trial(kind, f"{one.name} at {share:.2f}, then {'afresh' if fresh else 'from the cache'}", run,
                                limit=120)
        for _ in every:
            first, second = rng.sample(every, 2) if len(every) > 1 else every * 2

            def interleaved(first=first, second=second):
                for one in (first, second):
                    one.prepare()
                for one in (first, second, first):
                    one.again(False)
                return RECOVERED

            number += 1
            if chosen(number):
                yield Trial("families in turn", f"{first.name}, {second.name}", interleaved, limit=240)
