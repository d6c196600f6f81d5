"""The parts of the protocol beside the search: subsets, knowledge, texts that are too long."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_data import samples, write_model, write_native
from open_clip.tokenizer import SimpleTokenizer

from vlcl.errors import UserError
from vlcl_eval.datasets.class_names import class_names, templates
from vlcl_eval.datasets.find import find_data_set
from vlcl_eval.datasets.records import Split
from vlcl_eval.elevater.command import evaluate
from vlcl_eval.elevater.sampling import few_shot_subset
from vlcl_eval.elevater.search import Setting
from vlcl_eval.elevater.tasks import Subset, draw_subset, reference_forwards
from vlcl_eval.elevater.work import Protocol
from vlcl_eval.models import cut_tokens, load
from vlcl_eval.text import Knowledge, class_weights, cut_matters, read_knowledge


def test_subsets_of_one_shot_and_of_patch_camelyon(tmp_path: Path) -> None:
    """1 shot: the second image a class is for validation alone. patch-camelyon, full: searched on 10,000 a class."""
    write_native(tmp_path, "mnist", train=samples(10, 8, 0), test=samples(10, 1, 1))
    data = find_data_set(tmp_path, "mnist")
    subset = draw_subset(data, data.train, 1, seed=0)
    assert len(subset.train) == len(subset.val) == 10
    assert subset.final == subset.train
    full = draw_subset(data, data.train, "full", seed=0)
    assert full.final == list(range(80))
    assert len(full.val) == 10 * 2
    labels = [(i % 2,) for i in range(30_000)]
    pcam = replace(data, name="patch-camelyon", classes=["a", "b"])
    subset = draw_subset(pcam, Split("train", [data.train.refs[0]] * 30_000, labels, ""), "full", seed=2)
    assert (len(subset.train), len(subset.val), len(subset.final)) == (16_000, 4_000, 30_000)
    assert sorted(subset.train + subset.val) == sorted(few_shot_subset(labels, 2, 10_000, 2))


def test_forwards_of_the_reference_for_five_shots() -> None:
    """90 runs of 10 epochs over 5 C images, then 50 epochs over 5 C + N: 4500 C + 50 (5 C + N)."""
    subset = Subset(list(range(40)), list(range(40, 50)), list(range(50)))
    assert reference_forwards(90, subset, 10_000) == 4500 * 10 + 50 * (5 * 10 + 10_000)


def write_knowledge(folder: Path) -> Path:
    names = class_names("hateful-memes") or []
    (folder / "external").mkdir(parents=True)
    (folder / "gpt3").mkdir()
    external = [
        {"classname": names[0], "def_wiki": "An idea, passed on.", "def_wn": "", "path_wn": ["a", "b", "c", "d"]},
        {"classname": names[1], "def_wiki": None, "def_wn": "spite", "path_wn": ""},
    ]
    (folder / "external" / "hateful-memes_knowledge.tsv").write_text(json.dumps(external))
    gpt3 = [{"classname": name, "gpt3": [f"text {i} of {name}" + 4 * i * " more" for i in range(5)]} for name in names]
    (folder / "gpt3" / "GPT3_hateful-memes.tsv").write_text(json.dumps(gpt3))
    return folder


def test_knowledge_is_added_to_each_text(tmp_path: Path) -> None:
    folder, names = str(write_knowledge(tmp_path / "k")), class_names("hateful-memes") or []
    assert read_knowledge(Knowledge(folder, "wiktionary"), "hateful-memes", names) == {
        "meme": [" ; meme , An idea , passed on ."], "hatespeech meme": [" "],
    }  # fmt: skip
    assert read_knowledge(Knowledge(folder, "hierarchy", gpt3=1), "hateful-memes", names) == {
        "meme": [" ; meme , a b c", " ; meme , text 0 of meme"],
        "hatespeech meme": [" ; hatespeech meme ,", " ; hatespeech meme , text 0 of hatespeech meme"],
    }
    assert len(read_knowledge(Knowledge(folder, None, gpt3=3), "hateful-memes", names)["meme"]) == 3
    with pytest.raises(UserError, match=r"mnist_knowledge\.tsv cannot be read"):
        read_knowledge(Knowledge(folder, "wordnet"), "mnist", ["0"])
    with pytest.raises(UserError, match=r"no gpt3 for 1 classes of hateful-memes: \['comic'\]"):
        read_knowledge(Knowledge(folder, None, 1), "hateful-memes", [*names, "comic"])
    path = tmp_path / "k" / "external" / "hateful-memes_knowledge.tsv"
    before = Knowledge(folder, "wordnet").record(read_knowledge(Knowledge(folder, "wordnet"), "hateful-memes", names))
    path.write_text(path.read_text().replace("spite", "malice"))
    after = Knowledge(folder, "wordnet").record(read_knowledge(Knowledge(folder, "wordnet"), "hateful-memes", names))
    assert before != after  # another text is another measurement
    path.write_text(path.read_text().replace('"malice"', "5"))
    with pytest.raises(UserError, match="def_wn of 'hatespeech meme' is 5"):
        read_knowledge(Knowledge(folder, "wordnet"), "hateful-memes", names)


def test_knowledge_changes_the_record_and_long_texts_the_two_modes(tmp_path: Path) -> None:
    """The tiny model reads 24 tokens: in elevater mode a longer text has no end token, in strict mode it has."""
    knowledge = Knowledge(str(write_knowledge(tmp_path / "k")), "wiktionary", 5)
    write_native(tmp_path, "hateful-memes", train=samples(2, 10, 4), test=samples(2, 12, 5))
    spec = write_model(tmp_path / "model")
    folders: dict[str, Any] = {"output": tmp_path / "out", "cache": tmp_path / "cache"}
    plain, _ = evaluate(spec, tmp_path, ["hateful-memes"], Protocol(shots=(0,)), **folders)
    fixed = Protocol(shots=(0, 3), seeds=(0,), knowledge=knowledge, setting=Setting(0.1, 1e-4))
    both, problems = evaluate(spec, tmp_path, ["hateful-memes"], fixed, **folders)
    assert problems == {}
    assert len(both) == 2 + 2 + 2
    model = load(spec)
    names = class_names("hateful-memes") or []
    added = read_knowledge(knowledge, "hateful-memes", names)
    cut, kept = (class_weights(model, names, templates("hateful-memes"), added, cut) for cut in (True, False))
    assert not torch.allclose(cut, kept)
    new = [r for r in both if r not in plain]
    assert {r["protocol"]["knowledge"]["source"] for r in new} == {"wiktionary"}
    assert cut_matters(model, names, templates("hateful-memes"), added)
    assert not cut_matters(model, names, templates("hateful-memes"), None)


def test_cut_tokens_have_no_end_where_the_text_is_too_long() -> None:
    tokenizer = SimpleTokenizer(context_length=8)
    texts = ["a cat", "one two three four five six seven eight nine"]
    cut = cut_tokens(tokenizer, texts, 8)
    kept = tokenizer(texts)
    assert torch.equal(cut[0], kept[0])
    assert torch.equal(cut[1, :7], kept[1, :7])
    assert kept[1, 7] == tokenizer.eot_token_id
    assert cut[1, 7] == tokenizer.encode(texts[1])[6]


def test_too_few_training_images_are_said(tmp_path: Path) -> None:
    write_native(tmp_path, "mnist", train=samples(10, 1, 0), test=samples(10, 1, 1))
    data = find_data_set(tmp_path, "mnist")
    with pytest.raises(UserError, match="of 10 training images 10 are for validation and 0 for training"):
        draw_subset(data, data.train, 5, seed=0)
