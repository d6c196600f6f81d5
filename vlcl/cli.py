"""The console command `vlcl`. Each command's code is imported when the command runs, so that `--help` needs no torch.

`run_command` is the one place where a user's mistake becomes `error: ...` on stderr and exit code 2;
`python -m vlcl.train` goes through it as well.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from vlcl import __version__
from vlcl.data.urls import without_secrets
from vlcl.environment import let_threads_sleep, uncollected
from vlcl.errors import UserError, of_disk

# Commands by group: the function of that name in a module that is imported once the group's name is typed.
DATA_COMMANDS = {
    name: f"vlcl_data_prep.{name}"
    for name in ("openmoji", "emoji", "icons", "mnist", "pack", "index", "show", "stats", "verify")
} | {"elevater": "vlcl_eval.datasets.check"}
EVAL_COMMANDS: dict[str, str] = dict.fromkeys(
    ("elevater", "zeroshot", "datacomp", "retrieval", "report", "submission"), "vlcl_eval.commands"
) | {"linear": "vlcl_eval.linear_command"}

TRAIN_HELP = """Pretrain the two towers of CONFIG on image-text shards.

A setting is overridden as KEY=VALUE, the value being YAML; the later wins.

\b
The most used keys:
  data.train=SHARDS       {0000..0331}.tar, a folder; several joined by ::
  data.val=SHARDS         held-out pairs
  data.workers=4          reader processes per rank
  model.name=ViT-B-32     any open_clip model
  model.pretrained=TAG    an open_clip tag, or a path
  loss.name=em            infonce, siglip, fastclip-v3, ... (docs/losses.md)
  optim.lr=5e-4           peak learning rate
  train.output=runs/NAME  run folder
  train.steps=10000       or train.epochs=30
  train.batch_size=1024   over all ranks
  train.accumulate=4      chunks of a batch, where memory is short
  train.precision=bf16    or fp32, fp16
  train.seed=0
  checkpoint.every=1000   steps
  resume=latest           go on where the run folder stopped; auto: or begin
\b
All keys: docs/config.md
\b
Example:
  vlcl train configs/openmoji.yaml train.steps=200 loss.name=infonce
On several GPUs:
  accelerate launch -m vlcl.train CONFIG [KEY=VALUE]...
"""

COMPARE_HELP = """Run CONFIG with several losses, batch sizes and seeds; make one table and one figure of them.

Every cell of the grid is a run that sees as many samples as CONFIG does at its own batch size, in a folder of its own.
Finished cells are kept: the same command goes on where it stopped, and takes new losses, batch sizes and seeds.

\b
Example:
  vlcl compare configs/openmoji.yaml --loss em,infonce --batch-size 16,64,256 --seeds 3 train.epochs=5
\b
More: docs/compare.md
"""


class _TopGroup(TyperGroup):
    """Runs every command under run_command."""

    def invoke(self, ctx: Any) -> Any:
        invoke = super().invoke
        return run_command(lambda: invoke(ctx))


class _LazyGroup(TyperGroup):
    """The commands of `lookup`, imported once the group is typed."""

    lookup: dict[str, str] = {}  # noqa: RUF012 (a subclass sets it)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for name, module in self.lookup.items():
            if name not in self.commands:
                single = typer.Typer(add_completion=False)
                single.command(name)(getattr(import_module(module), name))
                self.commands[name] = typer.main.get_command(single)
        return super().parse_args(ctx, args)


class _DataGroup(_LazyGroup):
    lookup = DATA_COMMANDS


class _EvalGroup(_LazyGroup):
    lookup = EVAL_COMMANDS


app = typer.Typer(
    cls=_TopGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data = typer.Typer(cls=_DataGroup, no_args_is_help=True, help="Make, index and check image-text shards.")
app.add_typer(data, name="data")
evaluation = typer.Typer(cls=_EvalGroup, no_args_is_help=True, help="Evaluate a model without or with few labels.")
app.add_typer(evaluation, name="eval")


@data.callback()
def _data() -> None:
    """Make, index and check image-text shards."""


@evaluation.callback()
def _eval() -> None:
    """Evaluate a model: ELEVATER, zero-shot, retrieval."""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vlcl {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Vision-language pretraining: the quality of a large batch on the GPUs you have."""


def _completed_by(name: str) -> Callable[[str], list[str]]:
    """A function of vlcl/config/completion.py, imported when a shell asks."""
    return lambda incomplete: getattr(import_module("vlcl.config.completion"), name)(incomplete)


ConfigArgument = Annotated[
    str, typer.Argument(help="YAML file, e.g. configs/openmoji.yaml.", autocompletion=_completed_by("config_files"))
]


@app.command(help=TRAIN_HELP, short_help="Pretrain on image-text shards.")
def train(
    config: ConfigArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Settings that win over the file's.", autocompletion=_completed_by("setting_keys")
        ),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved settings as YAML, and stop.")
    ] = False,
) -> None:
    from vlcl.config import dump_config, load_config

    settings = load_config(config, overrides or [])  # a mistake shows at once, not after torch's import
    if print_config:
        typer.echo(dump_config(settings), nl=False)
        return
    from vlcl.paths import check_training

    check_training(settings)  # likewise
    if settings.data.stages:
        from vlcl.data.stages import load_stages

        load_stages(settings.data.stages)
    with uncollected():
        from vlcl.train import main

    main(config, overrides or [])


@app.command(short_help="Measure the gradient bias of mini-batches, and what a table can bring.")
def bias(
    run: Annotated[str, typer.Argument(help="Run folder of `vlcl train`, or a step folder of one.")],
    batch_sizes: Annotated[str, typer.Option(help="Batch sizes, joined by commas.")] = "8,32,128,512",
    permutations: Annotated[int, typer.Option(help="Random cuts of the data into batches; more: less noise.")] = 32,
    pairs: Annotated[int, typer.Option(help="At most so many training pairs.")] = 16384,
    estimators: Annotated[
        str, typer.Option(help="What to compare, joined by commas.")
    ] = "infonce,dcl,exact,sampled,table,converged,stale",
    weights: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="Towers' weights too, e.g. 'visual.transformer.resblocks.0.*'."),
    ] = None,
    weight_pairs: Annotated[int, typer.Option(help="Pairs that --weights is measured on.")] = 256,
    data: Annotated[str | None, typer.Option(metavar="SHARDS", help="Shards, where the run's have moved.")] = None,
    output: Annotated[
        str | None, typer.Option(metavar="DIR", help="For bias.json and bias.png.  [default: RUN/bias]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the permutations.")] = 0,
) -> None:
    """Mini-batch gradients of a frozen checkpoint against the exact gradient over all its training pairs.

    First, go or no-go advice: the effective number of negatives. Then bias and variance by batch size, of InfoNCE, of
    exact and sampled auxiliary variables, of the run's own table, and of rows as old as its older checkpoints.
    docs/gradient_bias.md explains the numbers.
    """
    from vlcl.paths import check_run

    check_run(run)
    with uncollected():
        from vlcl.gradient_bias.command import main

    main(
        run, batch_sizes=batch_sizes, permutations=permutations, pairs=pairs, estimators=estimators, weights=weights,
        weight_pairs=weight_pairs, data=data, output=output, seed=seed,
    )  # fmt: skip


@app.command(help=COMPARE_HELP, short_help="Compare losses over batch sizes and seeds.")
def compare(
    config: ConfigArgument,
    loss: Annotated[str, typer.Option(help="Losses, with settings where wanted: em,infonce,em:gamma=0.5:order=before")],
    batch_size: Annotated[str, typer.Option(help="Batch sizes: 16,64,256")],
    seeds: Annotated[str, typer.Option(help="How many (3: seeds 0, 1, 2), or which: 0,5")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings of every cell.")] = None,
    lr: Annotated[
        str | None, typer.Option(help="Learning rates to choose from in each cell; without it, that of CONFIG.")
    ] = None,
    scale_lr: Annotated[
        str, typer.Option(metavar="RULE", help="none, sqrt or linear: how --lr grows with the batch size.")
    ] = "none",
    tune: Annotated[
        bool, typer.Option("--tune", help="Find the rate with the first seed; the other seeds run at the best.")
    ] = False,
    widen: Annotated[int, typer.Option(help="With --tune: most rates beyond --lr at each end.")] = 2,
    metric: Annotated[
        str | None,
        typer.Option(help="What is shown, e.g. val/image_to_text_R@5; without it, mean R@1 both ways (of data.test)."),
    ] = None,
    select_on: Annotated[
        str | None, typer.Option(metavar="METRIC", help="What chooses the rate; without it, --metric on data.val.")
    ] = None,
    output: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder of runs, table and figure; without it, runs/compare-NAME.")
    ] = None,
    results: Annotated[
        str | None, typer.Option(metavar="FILE", help="File of finished cells, a line each; those in it are not run.")
    ] = None,
    discard: Annotated[bool, typer.Option("--discard", help="Delete the folder of a cell that --results has.")] = False,
    jobs: Annotated[int, typer.Option(help="Cells at a time, each in a process of its own.")] = 1,
) -> None:
    from vlcl.compare.command import main

    complete = main(
        config, loss, batch_size, seeds, lr, overrides or [], scale_lr=scale_lr, tune=tune, widen=widen, metric=metric,
        select_on=select_on, output=output, results=results, discard=discard, jobs=jobs,
    )  # fmt: skip
    if not complete:
        raise typer.Exit(1)


@app.command(short_help="Write one folder that transformers, open_clip and others load.")
def export(
    model: Annotated[
        str, typer.Argument(metavar="RUN", help="Run, step folder, exported folder, or open_clip NAME:TAG.")
    ],
    output: Annotated[str, typer.Argument(metavar="OUT", help="Folder to make; s3://, gs://, az://.")],
    ema: Annotated[bool, typer.Option("--ema", help="The moving average of the weights (train.ema).")] = False,
    half: Annotated[bool, typer.Option("--half", help="Store weights as float16.")] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="Both towers as ONNX files too (float32).")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export in OUT.")] = False,
    license: Annotated[str | None, typer.Option(metavar="ID", help="For the model card, e.g. apache-2.0.")] = None,
    push_to_hub: Annotated[str | None, typer.Option(metavar="REPO", help="Upload to the Hugging Face hub.")] = None,
    private: Annotated[bool, typer.Option("--private", help="A hub repository that only you see.")] = False,
) -> None:
    """Export RUN to OUT: one folder for transformers, sentence-transformers, open_clip, and ONNX Runtime.

    Before OUT gets its name, transformers, open_clip and ONNX Runtime load the files, and features of pictures and
    texts are compared with the model's own. docs/export.md has what fits where.

    \b
    Example:
      vlcl export runs/openmoji openmoji-clip --onnx --license apache-2.0
    """
    from vlcl.paths import check_export_folder, check_model

    check_model(model)
    check_export_folder(output)
    with uncollected():
        from vlcl.export.command import main

    main(
        model, output, averaged=ema, half=half, onnx=onnx, overwrite=overwrite, license=license,
        push_to_hub=push_to_hub, private=private,
    )  # fmt: skip


@app.command(short_help="List the architectures that model.name takes.")
def models(
    word: Annotated[str | None, typer.Argument(help="Part of a name or of a tag; without it, all.")] = None,
    tags: Annotated[bool, typer.Option("--tags", help="The pretrained tags of each, too.")] = False,
) -> None:
    """Architectures of open_clip and vlcl with their parameters, input, pretrained tags, and what an export of each is
    for in transformers.

    \b
    Example:
      vlcl models SigLIP
    """
    from vlcl.architectures import main

    main(word, tags)


def run_command(command: Callable[[], Any]) -> Any:
    """Call `command`; a UserError, Ctrl-C or a closed pipe ends the process with a line at most and no traceback.

    Exit codes: 2 for a user's mistake, 130 for Ctrl-C, 1 for a reader that went away (`vlcl ... | head`).
    """
    try:
        return command()
    except UserError as error:
        _stop(without_secrets(f"error: {error}"), code=2)
    except KeyboardInterrupt:
        _stop("interrupted", code=130)
    except BrokenPipeError:
        raise SystemExit(1) from None
    except OSError as error:
        if (said := of_disk(error)) is None:
            raise
        _stop(f"error: {said}", code=2)


def _stop(message: str, code: int) -> NoReturn:
    red = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    print(f"\033[31m{message}\033[0m" if red else message, file=sys.stderr)
    raise SystemExit(code) from None


def main() -> None:
    """Entry point of the console command."""
    let_threads_sleep()
    app(prog_name="vlcl")


if __name__ == "__main__":
    main()
