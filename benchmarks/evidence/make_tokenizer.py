"""Makes the tokenizer of benchmarks/evidence/model: byte-level BPE of 4,096 tokens, from training captions.

python benchmarks/evidence/make_tokenizer.py data/emoji/google data/icons/train

CLIP's own has 49,408 tokens: at batch 16 and width 64 their embedding would cost more than the rest of the step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from vlcl.data.captions import captions_from
from vlcl.data.shard import read_samples

MODEL = Path(__file__).parent / "model"
SIZE, LENGTH = 4096, 14
START, END = "<start>", "<end>"


def captions(folders: Iterable[str]) -> Iterator[str]:
    for folder in folders:
        for shard in sorted(Path(folder).glob("*.tar")):
            for sample in read_samples(str(shard)):
                yield from captions_from(sample.files).texts


def make(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - 1, special_tokens=["<pad>", "<unk>", START], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([END])  # last: open_clip's text tower looks for the end at the largest id
    ends = [(token, tokenizer.token_to_id(token)) for token in (START, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token=START, eos_token=END,
        model_max_length=LENGTH,
    )  # fmt: skip


if __name__ == "__main__":
    make(captions(sys.argv[1:])).save_pretrained(MODEL)
