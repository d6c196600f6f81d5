"""The tokenizer's and the image processor's files of a Hugging Face folder, for transformers 4 and 5, made offline.

transformers 5 reads processor_config.json and tokenizer.json; transformers 4 and libraries in other languages look for
preprocessor_config.json, vocab.json and merges.txt. All are written, with the same content whatever is installed here.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from open_clip.tokenizer import SimpleTokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from vlcl.hf.forms import Form

START, END, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# The commonest of what open_clip mends in a text (ftfy, html.unescape) before it cuts it into words.
_COMMON = {
    "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&apos;": "'", "&nbsp;": " ",
    "‘": "'", "’": "'", "“": '"', "”": '"',
}  # fmt: skip
_INTERPOLATION = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers
_PROCESSORS = {
    "CLIPModel": "CLIPProcessor",
    "MetaClip2Model": "CLIPProcessor",
    "SiglipModel": "SiglipProcessor",
    "VisionTextDualEncoderModel": "VisionTextDualEncoderProcessor",
}
# What the text tower takes of a tokenizer's output; SigLIP's is trained with its padding seen.
_INPUTS = {
    "CLIPModel": ["input_ids", "attention_mask"],
    "MetaClip2Model": ["input_ids", "attention_mask"],
    "SiglipModel": ["input_ids"],
}


def write_processor(folder: Path, form: Form, config: Mapping[str, Any], tokenize: Any) -> None:
    """All files that AutoProcessor, AutoTokenizer and AutoImageProcessor read. `config`: open_clip's format."""
    length = config["model_cfg"]["text_cfg"].get("context_length", 77)
    image = image_processor(config["preprocess_cfg"], form.name)
    # transformers 4 has SiglipProcessor make a SiglipImageProcessor, which can only squash.
    crops = image["image_processor_type"] == "CLIPImageProcessor" and form.name == "SiglipModel"
    processor = {"processor_class": "CLIPProcessor" if crops else _PROCESSORS[form.name]}
    more: dict[str, Any] = {"model_max_length": length} | processor
    if form.name in _INPUTS:
        more["model_input_names"] = _INPUTS[form.name]
    clean = (config["model_cfg"]["text_cfg"].get("tokenizer_kwargs") or {}).get("clean")
    if isinstance(tokenize, SimpleTokenizer):
        _write_bpe(folder, tokenize, clean or "lower", form.pad_row, more)
    else:
        _write_hf_tokenizer(folder, tokenize, clean or "whitespace", more)
    _write_json(folder / "preprocessor_config.json", image | processor)
    _write_json(folder / "processor_config.json", {"image_processor": image} | processor)
    if form.name == "SiglipModel":
        _write_sentence_transformers(folder, length)


def image_processor(preprocess: Mapping[str, Any], form: str) -> dict[str, Any]:
    """open_clip's preprocess_cfg as settings of transformers' image processors."""
    size = preprocess["size"]
    height, width = (size, size) if isinstance(size, int) else size
    squash = preprocess["resize_mode"] == "squash"
    settings = {
        "image_processor_type": "SiglipImageProcessor" if squash and form == "SiglipModel" else "CLIPImageProcessor",
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


def _colours(value: Any) -> list[float]:
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


def _cleaning(clean: str) -> list[Any]:
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
    _write_json(folder / "special_tokens_map.json", tokens)
    _write_json(
        folder / "tokenizer_config.json",
        {
            **tokens,
            # CLIPTokenizer of transformers 5 would build its own normalizer, without open_clip's cleaning.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False, "clean_up_tokenization_spaces": False,
            **more,
        },
    )  # fmt: skip


def _write_hf_tokenizer(folder: Path, tokenize: Any, clean: str, more: Mapping[str, Any]) -> None:
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
    _write_json(path, written | {"model_input_names": tokenizer.model_input_names} | more)


def _write_sentence_transformers(folder: Path, length: int) -> None:
    """SigLIP's text tower reads its last position, so that texts must be padded in full, which is not the default."""
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    features = {kind: {"method": f"get_{kind}_features", "method_output_name": "pooler_output"}
                for kind in ("text", "image")}  # fmt: skip
    content = {
        "transformer_task": "feature-extraction",
        "modality_config": features,
        "module_output_name": "sentence_embedding",
        "processing_kwargs": {"text": {"padding": "max_length", "max_length": length, "truncation": True}},
    }
    _write_json(folder / "sentence_bert_config.json", content)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
