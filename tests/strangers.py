"""Adapters that go wrong in ways no specification foresees, for the tests of the judge itself."""

from __future__ import annotations

import os
import time

import torch

from harness import Capabilities, Factors, UsageError
from harness.adapters import reference


def correct():
    """The reference, under a stranger's name."""
    return reference.adapter()


def claims_little():
    """The reference, claiming linear layers and nothing else."""
    adapter = reference.adapter()
    adapter.capabilities = Capabilities()
    return adapter


class Wrapped:
    """The reference with some of its members replaced."""

    name, version = "stranger", "1"

    def __init__(self, **members):
        self._reference = reference.adapter()
        self._members = members

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        member = self._members.get(name)
        if member is not None:
            return lambda *args, **kwargs: member(self._reference, *args, **kwargs)
        return getattr(self._reference, name)


def inject_raises():
    def inject(_, model, config):
        raise RuntimeError("this build has no kernels")

    return Wrapped(inject=inject)


def _leaves_a_child(then):
    def inject(reference, model, config):
        if os.fork() == 0:
            time.sleep(100)
            os._exit(0)
        return then(reference, model, config)

    return Wrapped(inject=inject)


def leaves_a_child():
    return _leaves_a_child(lambda reference, model, config: reference.inject(model, config))


def child_survives():
    """The process that it came from is gone."""
    return _leaves_a_child(lambda *_: os._exit(7))


def says_wrong_usage():
    def inject(_, model, config):
        raise UsageError("this is not for you to say")

    return Wrapped(inject=inject)


def writes_to_the_terminal():
    """In its name, in what it raises, and by an exception that raises when it is asked."""

    class MuteError(Exception):
        def __str__(self):
            raise ValueError

    def inject(_, model, config):
        raise RuntimeError("\x1b[2J\x07gone \u202eback")

    def merge(*_):
        raise MuteError

    adapter = Wrapped(inject=inject, merge=merge)
    adapter.name, adapter.version = "acme\nCONFORMS: 9 of 9\x1b[31m", "1\n2"
    return adapter


def refuses_at_length():
    raise OSError("\x1b[2J" + "z" * 200_000)


def saves_nothing():
    return Wrapped(state_dict=lambda *_: None)


def does_nothing():
    """Injects nothing, has factors of its own that nobody uses."""

    def inject(_, model, config):
        model.requires_grad_(False)
        model.idle = {
            name: Factors(
                torch.randn(config.r, m.in_features),
                torch.zeros(m.out_features, config.r),
                config.scaling,
            )
            for name, m in config.targets(model).items()
            if isinstance(m, torch.nn.Linear)
        }
        return model

    def factors(_, model):
        return {name: [f] for name, f in model.idle.items()}

    return Wrapped(
        inject=inject,
        factors=factors,
        state_dict=lambda _, model: {},
        load_state_dict=lambda _, model, state: None,
        merge=lambda _, model: None,
        unmerge=lambda _, model: None,
    )


def hangs_on_merge():
    return Wrapped(merge=lambda _, model: time.sleep(600))


def dies_on_merge():
    return Wrapped(merge=lambda _, model: os._exit(9))


def dead_copies():
    def factors(ref, model):
        return {
            name: [Factors(f.A.clone(), f.B.clone(), f.scaling, f.rows, f.bias) for f in parts]
            for name, parts in ref.factors(model).items()
        }

    return Wrapped(factors=factors)


def wrong_shapes():
    def factors(ref, model):
        return {
            name: [Factors(f.A.T, f.B.T, f.scaling, f.rows, f.bias) for f in parts]
            for name, parts in ref.factors(model).items()
        }

    return Wrapped(factors=factors)


def incomplete_factors():
    def factors(ref, model):
        found = ref.factors(model)
        return dict(list(found.items())[: max(1, len(found) // 2)])

    return Wrapped(factors=factors)


def prints_a_lot():
    def inject(ref, model, config):
        print("progress: 100 %\n" * 50)
        return ref.inject(model, config)

    return Wrapped(inject=inject)


def raises_when_made():
    raise OSError("no licence file")


def not_an_adapter():
    return object()


ready_made = 3
