"""Flags that several commands share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MODEL = "zoo:NAME, package.module:factory, an .onnx file, or a .pt2 file (which can run code)."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)]
OptionalModel = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL + " With --from: the plan's.")]
PlanPath = Annotated[Path, typer.Argument(metavar="[PLAN]", help="A plan written by search.")]
ModelArgs = Annotated[
    list[str] | None, typer.Option("--model-arg", metavar="K=V", help="Argument of the factory; repeatable.")
]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape", metavar="[NAME:]NxCxHxW", help="Input shape, where the model does not fix it; repeatable."
    ),
]
Dtype = Annotated[
    str, typer.Option("--dtype", help="float32, float64, bfloat16 or float16; the model's own by default.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:0.")]
Budget = Annotated[
    str,
    typer.Option(
        "--budget", metavar="SIZE|PERCENT", help="8GB (8e9 bytes), 8GiB (2^33), or 25% of plain's peak."
    ),
]
Reserve = Annotated[
    str,
    typer.Option(
        "--reserve", metavar="SIZE", help="Memory of the budget left for what is not in this model."
    ),
]
LossName = Annotated[
    str,
    typer.Option(
        "--loss",
        help="cross_entropy, mse, l1, smooth_l1, bce_with_logits, dice_ce (options as in "
        "cross_entropy:ignore_index=255), or module:function; of the model's first output. By default from "
        "that output's shape.",
    ),
]
OptimizerName = Annotated[
    str,
    typer.Option(
        "--optimizer",
        help="sgd, adam, adamw, rmsprop, or torchao's adamw8bit, adamw4bit; with options, as in "
        "sgd:lr=0.01,momentum=0.9.",
    ),
]
DeviceProfile = Annotated[
    str,
    typer.Option(
        "--device-profile",
        metavar="NAME|FILE",
        help="Times are for this device: a file of calibrate -o, or one that comes with rowtune.",
    ),
]
Savers = Annotated[
    str,
    typer.Option(
        "--savers",
        metavar="NAMES",
        help="What plans may use: rows, checkpoint, turns, images, recompute, channels_last (these by "
        "default), offload, offload_gradients, offload_state, step_in_backward (these where nothing fits "
        "without), bf16, capture (CUDA graphs); or changes to the default, as in +offload,-turns.",
    ),
]
MaxGradError = Annotated[
    float,
    typer.Option(
        "--max-grad-error",
        metavar="X",
        help="How far gradients may be off, relative to the largest of their tensor, for what is kept to be "
        "rounded (fp16, int8); 0: not at all.",
    ),
]
HostBudget = Annotated[
    str,
    typer.Option(
        "--host-budget",
        metavar="SIZE",
        help="What plans may keep in the host's memory (savers offload...); half of what is free by default.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Of weights, data and search.", min=0)]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Results only.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="More detail, and tracebacks.")]
