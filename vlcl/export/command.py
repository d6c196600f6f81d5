"""Command: a checkpoint -> one folder that transformers, open_clip, sentence-transformers and ONNX Runtime all load.

    OUT/config.json, model.safetensors, processor and tokenizer files      transformers 4 and 5, sentence-transformers
        open_clip_config.json, open_clip_model.safetensors                 open_clip (`local-dir:OUT`), vlcl
        onnx/image_encoder.onnx, onnx/text_encoder.onnx                    with --onnx
        README.md, training_curve.png                                      the model card

The folder is made under another name and checked there: transformers, open_clip and ONNX Runtime load it, and features
are compared with the model's own. Only then does it get its name, so that a folder OUT is always a whole one.
"""

from __future__ import annotations

import copy
import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import logging

from vlcl import files
from vlcl.checkpoint import AVERAGED, find_model, load_model
from vlcl.data.decode import BACKGROUND
from vlcl.data.urls import fetch_command, without_secrets
from vlcl.errors import UserError
from vlcl.export.card import README, Card, write_card
from vlcl.export.check import TOLERANCE, Findings, Pairs, drawn_pairs, half_reference, reference
from vlcl.export.format import Format, Job, asked_for
from vlcl.export.formats import FORMATS
from vlcl.export.output import check_output, in_store
from vlcl.export.run_facts import RunFacts, read_run
from vlcl.export.views import write_views
from vlcl.hf.forms import Form, find_form
from vlcl.hf.towers import NoForm, Tokenize
from vlcl.model import Built
from vlcl.pieces import stored


@dataclass(frozen=True)
class Exported:
    """What an export made. `reason`: why transformers has no class for the model, where it has none. `address`: of a
    store, where it is; then `folder`, where it was made, is gone. `bytes`: of all its files."""

    folder: Path
    form: str | None
    reason: str | None
    findings: Findings
    address: str | None = None
    bytes: int = 0


def main(
    source: str,
    output: str,
    *,
    averaged: bool,
    half: bool,
    overwrite: bool,
    license: str | None,
    push_to_hub: str | None,
    private: bool,
    **formats: bool,
) -> None:
    """The command: export, say what was found, upload where asked. `formats`: see export_model."""
    if private and push_to_hub is None:
        raise UserError("--private is about a hub repository; give --push-to-hub REPO with it")
    if push_to_hub is not None:
        from vlcl.export.hub import check_hub

        push_to_hub = check_hub(push_to_hub)
        if "://" in output:
            raise UserError(f"--push-to-hub sends a folder: give a FOLDER as OUT, not {without_secrets(output)}")
    made = export_model(
        source, output, averaged=averaged, half=half, overwrite=overwrite, license=license, name=push_to_hub, say=print,
        **formats,
    )  # fmt: skip
    found = made.findings
    for library, towers in found.by_library().items():
        print(f"         {library}: " + ", ".join(f"{tower} {error:.1e}" for tower, error in towers.items()))
    print(f"         largest difference allowed: {TOLERANCE:.0e} of vectors of length 1")
    if found.half is not None:
        print(f"         float16 weights themselves change features by {found.half:.1e}")
    for note in (format.note(found) for format in FORMATS):
        if note:
            print(note)
    size = f"{made.bytes / 1e6:,.0f} MB"
    if made.address is not None:
        print(f"wrote    {made.address} ({size}); to use it (its README.md says how): {fetch_command(made.address)}")
    else:
        print(f"wrote    {made.folder} ({size}); how to use it: {made.folder / 'README.md'}")
    if push_to_hub is not None:
        from vlcl.export.hub import push

        print(f"uploaded {push(made.folder, push_to_hub, private)}")


def export_model(
    source: str,
    output: str | Path,
    *,
    averaged: bool = False,
    half: bool = False,
    overwrite: bool = False,
    license: str | None = None,
    name: str | None = None,
    say: Callable[[str], None] = print,
    **formats: bool,
) -> Exported:
    """Export `source` (a run, a step folder, an exported folder, an open_clip name with its tag) to a new folder, or to
    an address of a store (s3, gs, az).

    `averaged`: the moving average of the weights, where the run kept one. `half`: weights stored as float16 (ONNX stays
    float32). `name`: what the model card calls the folder, REPO on a hub. `formats`: those to write beside what is
    always written, by their `option` (`onnx=True`). Raises UserError; `output` is then as it was.
    """
    wanted = asked_for(FORMATS, formats)
    if "://" in str(output):
        with in_store(str(output), overwrite) as place:
            made = export_model(
                source, place, averaged=averaged, half=half, license=license, name=name, say=say, **formats
            )
        return replace(made, address=without_secrets(str(output)))
    output, model = Path(output), find_model(source)  # once: a run that goes on may make a newer checkpoint

    def check(target: Path) -> None:
        check_output(target, model, overwrite)

    check(output)
    for format in wanted:
        format.require_packages()
    built = _load(source if model is None else str(model), averaged)
    facts, pairs = _facts(model, averaged, say)
    folder = output.absolute()
    if not built.encoder.has_text:
        return _export_views(built, facts, pairs, folder, check, name or folder.name, license, half, wanted, say)
    try:
        with files.replacing([folder], check) as (building,), _quiet_transformers():
            job = prepare(building, built, pairs, half, facts.background if facts else BACKGROUND)
            written = _write(job, wanted, say)
            write_card(building, Card(name or folder.name, job, written, averaged, license, facts))
            _open_to_all(building)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{output} could not be written: {_why(error)}; it is as it was before") from None
    form = job.form.hf_class.name if job.form else None
    return Exported(output, form, job.reason, job.found, bytes=_bytes_in(folder))


def _export_views(
    built: Built, facts: RunFacts | None, pairs: Pairs, folder: Path, check: Callable[[Path], None], name: str,
    license: str | None, half: bool, wanted: Sequence[Format], say: Callable[[str], None],
) -> Exported:  # fmt: skip
    """An image tower alone, in formats of its own."""
    if asked := [format.option for format in wanted if format.option]:
        raise UserError(
            f"--{asked[0]}: an image tower alone (model.kind=views) is exported for timm and transformers only"
        )
    try:
        with files.replacing([folder], check) as (building,), _quiet_transformers():
            found = write_views(building, built, facts, name, license, half, pairs.images, pairs.origin, say)
            _open_to_all(building)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} could not be written: {_why(error)}; it is as it was before") from None
    return Exported(folder, None, "it has no text tower", found, bytes=_bytes_in(folder))


def _facts(model: Path | None, averaged: bool, say: Callable[[str], None]) -> tuple[RunFacts | None, Pairs]:
    """What is known of the model's run, and pairs to check the export on."""
    say(f"model    {model or 'of open_clip'}" + (", the moving average of its weights" if averaged else ""))
    if model is not None and stored(model, AVERAGED).exists() and not averaged:
        say("         the run kept a moving average of its weights too: --ema exports that")
    facts = read_run(model)
    if facts is None:
        say("         no run beside it: the model card has no training facts")
        return None, drawn_pairs()
    pairs = facts.pairs()
    if pairs is None:
        shards = without_secrets(str(facts.setting("data.val") or facts.setting("data.train")))
        say(f"         the run's shards are not found from here ({shards}): drawn pictures are compared")
    return facts, pairs or drawn_pairs()


def _load(source: str, averaged: bool) -> Built:
    """UserError in this command's words."""
    if not Path(source).exists() and ":" not in source:
        raise UserError(
            f"{source!r} is no run, checkpoint or exported folder; an open_clip model needs its tag, {source}:TAG "
            "(without one its weights would be random)"
        )
    try:
        with redirect_stderr(StringIO()):
            return load_model(source, averaged)
    except UserError as error:
        text = str(error).replace("model.name=", "").replace(", model.pretrained=None", "")
        raise UserError(f"cannot load {source}: {text}") from None


def prepare(folder: Path, built: Built, pairs: Pairs, half: bool, background: str = BACKGROUND) -> Job:
    """What all formats of an export to `folder` need: transformers' form of the model, and features to compare with."""
    config, found = _with_own_weights(built.config), Findings(pairs.origin, len(pairs.images), len(pairs.texts))
    full = reference(built, pairs)
    stored = half_reference(full, found) if half else full
    form, reason, weights = _form(built.encoder.clip, config, built.tokenize)
    return Job(folder, built, config, half, form, reason, weights, pairs, full, stored, found, background)


def _write(job: Job, wanted: Sequence[Format], say: Callable[[str], None]) -> list[Format]:
    """All files but the card, and the checks; those of `wanted` that the model fits."""
    reasons = {format: format.why_not(job) for format in wanted}
    formats = [format for format, reason in reasons.items() if reason is None]
    labels = [text for format in sorted(formats, key=lambda x: x.card_place) if (text := format.label(job))]
    missing = dict.fromkeys(reason for reason in reasons.values() if reason is not None)
    say(f"format   {' and '.join(labels)}" + (f" only: {'; '.join(missing)}" if missing else ""))
    stored = [format for format in formats if not format.converted]
    for format in stored:
        format.write(job)
    say(f"check    {job.found.images} pictures and {job.found.texts} texts ({job.found.origin})")
    for format in stored:
        format.check(job)
    for format in formats:
        if format.converted:
            format.write(job)
            format.check(job)
    return formats


def _form(
    clip: nn.Module, config: Mapping[str, Any], tokenize: Tokenize
) -> tuple[Form | None, str | None, dict[str, Tensor]]:
    """transformers' class for the model and its weights there, or why there is none."""
    try:
        form = find_form(clip, config, tokenize)
        return form, None, form.weights(clip)
    except NoForm as error:
        return None, str(error), {}
    except (KeyError, ValueError) as error:  # a tensor that a setting adds or takes away
        return None, f"its weights are not those of the class there, at {error}", {}


def _with_own_weights(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config, with no word of weights to fetch from elsewhere before those of the folder are loaded."""
    config = copy.deepcopy(dict(config))
    if "hf_model_name" in config["model_cfg"]["text_cfg"]:
        config["model_cfg"]["text_cfg"]["hf_model_pretrained"] = False
    if "timm_model_name" in config["model_cfg"]["vision_cfg"]:
        config["model_cfg"]["vision_cfg"]["timm_model_pretrained"] = False
    return config


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its progress bars and its warnings about the defaults of configs that it makes on the way."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _open_to_all(folder: Path) -> None:
    """safetensors makes files that only their owner may read; all get the mode that new files have here."""
    mode = (folder / README).stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def _why(error: OSError | SafetensorError) -> str:
    text = (str(error).splitlines() or [type(error).__name__])[0]
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    full = full or any(x in text for x in ("No space left", "File too large", "quota"))
    return f"{text}. Make room and repeat" if full else text
