"""A small corpus of real text, tokenized and indexed by the product's own functions."""

from boreal_megatron.data.indexed import IndexedWriter, best_dtype
from boreal_megatron.data.tokenizer import train_bpe

VOCABULARY = 640


def make_corpus(folder, stdlib, documents=60):
    """Some standard-library modules: a byte-level BPE of 640 entries, a training and a validation set."""
    texts = [p.read_text(encoding="utf-8") for p in sorted(stdlib.glob("*.py"))[:documents]]
    tokenizer = train_bpe(texts[:20], VOCABULARY, folder / "tokenizer")
    paths = {"tokenizer": folder / "tokenizer"}
    for split, part in (("train", texts[4:]), ("valid", texts[:4])):
        paths[split] = folder / split
        writer = IndexedWriter(paths[split], best_dtype(VOCABULARY))
        for text in part:
            # Pieces of uneven length, so that windows hold several documents.
            for start in range(0, min(len(text), 12_000), 1_700):
                writer.append([*tokenizer.encode(text[start : start + 1_700 - start % 977]), tokenizer.eod])
        writer.close()
    return paths
