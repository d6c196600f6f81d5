"""The tokenizer's and the image processor's files of a Hugging Face folder, for transformers 4 and 5, made offline.

transformers 5 reads processor_config.json and tokenizer.json; transformers 4 and libraries in other languages look for
preprocessor_config.json, vocab.json and merges.txt. All are written, with the same content whatever is installed here.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from vlcl.hf.forms import Form
from vlcl.hf.towers import Tokenize

START, END, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# The commonest of what open_clip mends in a text (ftfy, html.unescape) before it cuts it into words.
_COMMON = {
    "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&apos;": "'", "&nbsp;": " ",
    "‘": "'", "’": "'", "“": '"', "”": '"',
}  # fmt: skip
_INTERPOLATION = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers

PROCESSOR_FILES = {"preprocessor_config.json", "processor_config.json"}
# Of all kinds of tokenizers.
TOKENIZER_FILES = {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
    "added_tokens.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
}  # fmt: skip


def write_processor(folder: Path, form: Form, config: Mapping[str, Any], tokenize: Tokenize) -> None:
    """All files that AutoProcessor, AutoTokenizer and AutoImageProcessor read. `config`: open_clip's format."""
    length, hf_class = config["model_cfg"]["text_cfg"].get("context_length", 77), form.hf_class
    image = image_processor(config["preprocess_cfg"], hf_class.squashing_processor)
    # transformers 4 has SiglipProcessor make a SiglipImageProcessor, which can only squash.
    crops = image["image_processor_type"] != hf_class.squashing_processor
    processor = {"processor_class": "CLIPProcessor" if crops else hf_class.processor}
    more: dict[str, Any] = {"model_max_length": length} | processor
    if hf_class.token_inputs is not None:
        more["model_input_names"] = list(hf_class.token_inputs)
    clean = (config["model_cfg"]["text_cfg"].get("tokenizer_kwargs") or {}).get("clean")
    if isinstance(tokenize, SimpleTokenizer):
        _write_bpe(folder, tokenize, clean or "lower", form.pad_row, more)
    elif isinstance(tokenize, HFTokenizer):
        _write_hf_tokenizer(folder, tokenize, clean or "whitespace", more)
    write_json(folder / "preprocessor_config.json", image | processor)
    write_json(folder / "processor_config.json", {"image_processor": image} | processor)


def image_processor(preprocess: Mapping[str, Any], squashing: str) -> dict[str, Any]:
    """open_clip's preprocess_cfg as settings of transformers' image processors; `squashing`: the one that squashes."""
    size = preprocess["size"]
    height, width = (size, size) if isinstance(size, int) else size
    squash = preprocess["resize_mode"] == "squash"
    settings = {
        "image_processor_type": squashing if squash else "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": height, "width": width} if squash else {"shortest_edge": min(height, width)},
        "resample": _INTERPOLATION.get(preprocess["interpolation"], 3),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _colours(preprocess["mean"]),
        "image_std": _colours(preprocess["std"]),
    }
    if settings["image_processor_type"] == "CLIPImageProcessor":
        settings |= {"do_center_crop": not squash, "crop_size": {"height": height, "width": width}}
    return settings


def _colours(value: float | Sequence[float]) -> list[float]:
    return [float(value)] * 3 if isinstance(value, int | float) else [float(x) for x in value]


def bpe_tokenizer(tokenize: SimpleTokenizer, clean: str, pad_row: bool) -> Tokenizer:
    """open_clip's own tokenizer in the tokenizers library; of ftfy and HTML entities it does what _COMMON has."""
    renamed = {tokenize.decoder[tokenize.sot_token_id]: START, tokenize.decoder[tokenize.eot_token_id]: END}
    vocab = {renamed.get(token, token): i for token, i in tokenize.encoder.items()}
    merges: Any = sorted(tokenize.bpe_ranks, key=lambda pair: tokenize.bpe_ranks[pair])
    specials = [START, END]
    if pad_row:
        vocab[PAD] = len(vocab)
        specials.append(PAD)
    model: Any = BPE(vocab=vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=END)
    bpe: Any = Tokenizer(model)
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), *_cleaning(clean)])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    bpe.post_processor = processors.RobertaProcessing((END, vocab[END]), (START, vocab[START]), False, False)
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return bpe


def _cleaning(clean: str) -> list[normalizers.Normalizer]:
    """open_clip's ways of cleaning a text, as far as normalizers go."""
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    common = [normalizers.Replace(before, after) for before, after in _COMMON.items()]
    if clean != "canonicalize":
        return [*common, spaces, normalizers.Strip(), *([normalizers.Lowercase()] if clean == "lower" else [])]
    punctuation = "".join(f"\\{x}" for x in string.punctuation)
    return [
        *common,
        normalizers.Replace("_", " "),
        normalizers.Replace(Regex(f"[{punctuation}]"), ""),
        normalizers.Lowercase(),
        spaces,
        normalizers.Strip(),
    ]


def _write_bpe(folder: Path, tokenize: SimpleTokenizer, clean: str, pad_row: bool, more: Mapping[str, Any]) -> None:
    bpe = bpe_tokenizer(tokenize, clean, pad_row)
    bpe.save(str(folder / "tokenizer.json"))
    content = json.loads(bpe.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(content["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    tokens = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": PAD if pad_row else END}
    write_json(folder / "special_tokens_map.json", tokens)
    write_json(
        folder / "tokenizer_config.json",
        {
            **tokens,
            # CLIPTokenizer of transformers 5 would build its own normalizer, without open_clip's cleaning.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False, "clean_up_tokenization_spaces": False,
            **more,
        },
    )  # fmt: skip


def _write_hf_tokenizer(folder: Path, tokenize: HFTokenizer, clean: str, more: Mapping[str, Any]) -> None:
    """The model's own Hugging Face tokenizer, with open_clip's cleaning before it where that changes words."""
    tokenizer: Any = tokenize.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if clean == "canonicalize" and backend is not None:
        from transformers import PreTrainedTokenizerFast

        backend = Tokenizer.from_str(backend.to_str())
        own = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = normalizers.Sequence([*_cleaning(clean), *own])
        names = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
        tokens = {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name, None) is not None}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, padding_side=tokenizer.padding_side, truncation_side=tokenizer.truncation_side,
            **tokens,
        )  # fmt: skip
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    if written.get("tokenizer_class") == "TokenizersBackend":  # its name in transformers 5, which 4 does not know
        written["tokenizer_class"] = "PreTrainedTokenizerFast"
        # What transformers 4 would take for granted otherwise.
        state = (folder / "tokenizer.json").read_text(encoding="utf-8")
        written["add_prefix_space"] = bool((json.loads(state)["pre_tokenizer"] or {}).get("add_prefix_space", False))
    write_json(path, written | {"model_input_names": tokenizer.model_input_names} | more)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
