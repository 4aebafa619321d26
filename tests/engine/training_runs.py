"""One model of a set trained, as tests want it: on the CPU, with what was told of it."""

import torch

from musiclm_engine.training.run import train


def train_one(name, config, manifest, run_dir, **arguments):
    told = []
    train(
        name,
        config=str(config),
        manifest=manifest,
        run_dir=run_dir,
        device=torch.device("cpu"),
        report=lambda *what: told.append(what),
        **arguments,
    )
    return told
