"""The flags of `rowtune run`; those that other commands have as well are in options.py."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class EngineName(StrEnum):
    """What runs rows segments."""

    listed = "listed"
    traced = "traced"


class FitName(StrEnum):
    """How an image comes to the plan's size."""

    resize = "resize"
    crop = "crop"


DATA, STEPS, FILES = "Data", "Steps", "Files"

Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="FOLDER|MODULE:FACTORY",
        rich_help_panel=DATA,
        help="A folder: one folder of images a class, or images/ and masks/, or input/ and target/; or "
        "module:factory, which returns a DataLoader or Dataset of (input, target). Random data by default.",
    ),
]
Val = Annotated[
    str,
    typer.Option(
        "--val",
        metavar="FOLDER|MODULE:FACTORY",
        rich_help_panel=DATA,
        help="As --data: validated after every epoch, by accuracy, mean IoU or PSNR.",
    ),
]
Fit = Annotated[
    FitName | None,
    typer.Option(
        "--fit",
        rich_help_panel=DATA,
        help="resize: the whole image in the plan's size; crop: a piece of that size, at random (for --val "
        "in the middle). By default input/target pairs are cropped, all others resized.",
    ),
]
Workers = Annotated[
    int, typer.Option("--workers", min=0, help="Processes that read images.", rich_help_panel=DATA)
]
FrontBudget = Annotated[
    str,
    typer.Option(
        "--budget",
        metavar="SIZE|PERCENT",
        help="Train with the fastest plan of the file's front within this: 8GB (8e9 bytes), 8GiB (2^33), or "
        "25% of plain's peak.",
    ),
]
Steps = Annotated[
    int | None, typer.Option("--steps", help="Training steps; 10 on random data.", rich_help_panel=STEPS)
]
Epochs = Annotated[
    int | None, typer.Option("--epochs", help="Passes over --data; 1 by default.", rich_help_panel=STEPS)
]
Lr = Annotated[
    float | None, typer.Option("--lr", min=0.0, help="Another learning rate.", rich_help_panel=STEPS)
]
Schedule = Annotated[
    str,
    typer.Option(
        "--schedule",
        rich_help_panel=STEPS,
        help="Of the learning rate, by step: constant, cosine (to 0, or to cosine:floor=0.01 of it) or "
        "step (step:every=1000,gamma=0.1; by default in thirds of the run).",
    ),
]
Warmup = Annotated[
    int, typer.Option("--warmup", min=0, help="Steps in which the rate rises.", rich_help_panel=STEPS)
]
Clip = Annotated[
    float,
    typer.Option("--clip", min=0.0, help="Largest norm of the gradient; 0: any.", rich_help_panel=STEPS),
]
Accumulate = Annotated[
    int, typer.Option("--accumulate", min=1, help="Batches to an optimizer step.", rich_help_panel=STEPS)
]
Ema = Annotated[
    float,
    typer.Option(
        "--ema",
        metavar="DECAY",
        rich_help_panel=STEPS,
        help="Keep an average of the weights, e.g. 0.999: it is what is validated and saved.",
    ),
]
RunSeed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        min=0,
        rich_help_panel=STEPS,
        help="Of drawn weights, order, crops and dropout; the plan's own by default.",
    ),
]
KeepGoing = Annotated[
    bool,
    typer.Option(
        "--keep-going", rich_help_panel=STEPS, help="Train on when the loss is infinite or not a number."
    ),
]
Save = Annotated[
    Path | None,
    typer.Option(
        "--save",
        rich_help_panel=FILES,
        help="Write the weights: .safetensors, .pt, or .onnx, which is the plan's own file with the trained "
        "weights in it.",
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        metavar="DIR",
        rich_help_panel=FILES,
        help="Keep the newest checkpoint here; Ctrl-C and SIGTERM write one as well.",
    ),
]
CheckpointEvery = Annotated[
    int,
    typer.Option(
        "--checkpoint-every",
        min=0,
        metavar="STEPS",
        rich_help_panel=FILES,
        help="By default after every epoch.",
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        rich_help_panel=FILES,
        help="Go on from the newest checkpoint, bit for bit; begin where there is none.",
    ),
]
Metrics = Annotated[
    Path | None,
    typer.Option(
        "--metrics",
        metavar="FILE.jsonl",
        rich_help_panel=FILES,
        help="A line of JSON for every step and validation.",
    ),
]
Tensorboard = Annotated[
    Path | None,
    typer.Option(
        "--tensorboard",
        metavar="DIR",
        rich_help_panel=FILES,
        help="Event files; needs the package tensorboard.",
    ),
]
Engine = Annotated[
    EngineName,
    typer.Option("--engine", help="listed: run recorded calls; traced: run the schedule itself."),
]
VerifyEvery = Annotated[
    int,
    typer.Option("--verify-every", min=0, help="Compare both engines every so many steps; 0: never."),
]
CheckErrorEvery = Annotated[
    int,
    typer.Option(
        "--check-error-every",
        min=0,
        metavar="STEPS",
        help="Measure how far gradients are off every so many steps, on the batch at hand, where stores "
        "round; 0: never.",
    ),
]
Fsdp = Annotated[
    bool,
    typer.Option(
        "--fsdp",
        help="Under torchrun: weights, gradients and optimizer state lie in parts, one with each process.",
    ),
]
