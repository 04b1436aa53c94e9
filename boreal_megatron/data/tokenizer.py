"""Tokenizers: train a small byte-level BPE, load any Hugging Face `tokenizer.json` or SentencePiece `tokenizer.model`.

Encoding treats text as text: a document in which the end-of-document marker is written out is common (documentation,
source code about tokenizers), and must not become a document boundary in the training data.
"""

import contextlib
import hashlib
import json
import os
from functools import cached_property
from pathlib import Path

import tokenizers

from boreal_megatron.errors import BorealError

END_OF_DOCUMENT = "<|endoftext|>"
# What may belong to a tokenizer; nothing else of its folder travels with checkpoints and exports.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
# Tried in this order where tokenizer_config.json names no eos_token.
KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<|eot_id|>", "<eos>", "<|im_end|>", "<eod>", "[EOS]")

# Qwen's split, written as Qwen writes it, so that every fast engine knows it: contractions, words with the sign before
# them, single digits, punctuation, line ends.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)


def train_bpe(texts, vocab_size, out_dir):
    """Trains a byte-level BPE tokenizer and writes `tokenizer.json` and `tokenizer_config.json`.

    The same texts in the same order give the same file. Every byte has its own token, so any text can be encoded
    and decodes to itself.

    Args:
        texts: iterable of str, read once.
        vocab_size: number of entries, `<|endoftext|>` (id 0) and the 256 bytes included.
        out_dir: folder, made if missing; `AutoTokenizer.from_pretrained(out_dir)` loads it.

    Returns:
        The loaded `Tokenizer`.

    Raises:
        BorealError: the vocabulary is too small to hold the bytes, or the text too poor to fill it.
    """
    from tokenizers import decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    least = len(alphabet) + 1
    if vocab_size < least:
        raise BorealError(f"vocab_size={vocab_size}. Expected: at least {least}, the 256 bytes and {END_OF_DOCUMENT}.")
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    found = bpe.get_vocab_size()
    if found != vocab_size:
        raise BorealError(
            f"The text gives only {found} vocabulary entries. Expected: vocab_size={vocab_size}. "
            f"Give more text, or set the vocabulary to {found} or less."
        )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_DOCUMENT,
        "clean_up_tokenization_spaces": False,
    }
    out_dir = Path(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for name, content in (
            ("tokenizer_config.json", json.dumps(config, indent=2) + "\n"),
            ("tokenizer.json", bpe.to_str(pretty=True)),
        ):
            partial = out_dir / (name + ".partial")
            try:
                partial.write_text(content, encoding="utf-8")
                os.replace(partial, out_dir / name)
            except BaseException:
                with contextlib.suppress(OSError):
                    partial.unlink()
                raise
    except OSError as error:
        raise BorealError(
            f"{out_dir}: the tokenizer cannot be written: {error.strerror or error}. "
            "Check the folder and the space on its disk, and run again."
        ) from error
    return Tokenizer.load(out_dir)


class Tokenizer:
    """A Hugging Face tokenizer that encodes plain text only; make one with `Tokenizer.load(folder)`.

    Attributes:
        folder: where it was loaded from.
        library: the distribution that encodes.
        eod: id of the end-of-document token.
        eod_token: that token as text.
        fingerprint: sha256 of `tokenizer.json`; equal fingerprints mean equal ids.
    """

    library = "tokenizers"

    def __init__(self, folder, backend, fingerprint, eod_token):
        self.folder = folder
        self.fingerprint = fingerprint
        self.eod_token = eod_token
        self.eod = backend.token_to_id(eod_token)
        self._backend = backend

    @classmethod
    def load(cls, folder):
        """Loads `folder/tokenizer.json`; without one, `folder/tokenizer.model` as a `SentencePieceTokenizer`.

        Raises:
            BorealError: it is missing or unreadable, or names no end-of-document token.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.exists() and (folder / "tokenizer.model").exists():
            return SentencePieceTokenizer(folder)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BorealError(
                f"{path}: cannot be read: {error.strerror}. Expected: a tokenizer folder with a tokenizer.json "
                "(the Hugging Face format) or a tokenizer.model (SentencePiece). Train one with "
                "`boreal data train-tokenizer`, or download a model's."
            ) from None
        try:
            backend = tokenizers.Tokenizer.from_buffer(content)
        except ValueError as error:
            raise BorealError(
                f"{path}: not a tokenizer: {error}. Expected: the Hugging Face tokenizer.json format. "
                "Copy the file again, or train a new one with `boreal data train-tokenizer`."
            ) from None
        backend.no_truncation()  # some published files carry a truncation or padding of their own
        backend.no_padding()
        tokenizer = cls(folder, backend, hashlib.sha256(content).hexdigest(), _find_end(folder, backend))
        tokenizer.specials_are_text = True
        return tokenizer

    @property
    def specials_are_text(self):
        """Whether special tokens that are written out in a text are encoded as text; True unless it is set."""
        return self._backend.encode_special_tokens

    @specials_are_text.setter
    def specials_are_text(self, value):
        self._backend.encode_special_tokens = value

    @cached_property
    def vocab_size(self):
        """The number of ids, added tokens included: every id is below it, also where ids have gaps."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def added_tokens(self):
        """Text of each token that is looked for before the text is split -> whether it is special."""
        return {token.content: token.special for token in self._backend.get_added_tokens_decoder().values()}

    def encode(self, text):
        """Returns the ids of a text; nothing is added before or after."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        """Returns the ids of each text; runs on all cores where there are several texts."""
        return [e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids):
        """Returns the text of ids, special tokens included."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)


class SentencePieceTokenizer:
    """A SentencePiece `tokenizer.model`, with the attributes and methods of `Tokenizer`.

    SentencePiece never reads a control symbol such as `</s>` out of a text, so `specials_are_text` changes nothing.
    """

    library = "sentencepiece"

    def __init__(self, folder):
        try:
            import sentencepiece
        except ImportError:
            raise BorealError(
                f"{folder}: has a tokenizer.model only, and sentencepiece is not installed. "
                "Expected: pip install 'boreal-megatron[data]', or a folder with a tokenizer.json."
            ) from None
        path = folder / "tokenizer.model"
        self.folder = folder
        model = path.read_bytes()
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.specials_are_text = True
        try:
            self._backend = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise BorealError(f"{path}: not a SentencePiece model: {error}. Copy the file again.") from None
        self.eod = self._backend.eos_id()
        if self.eod < 0:
            raise BorealError(
                f"{path}: has no end-of-sentence symbol. Expected: one, to end documents. Train it with eos_id."
            )
        self.eod_token = self._backend.id_to_piece(self.eod)

    @cached_property
    def vocab_size(self):
        return self._backend.get_piece_size()

    @cached_property
    def added_tokens(self):
        return {}

    def encode(self, text):
        return self._backend.encode(text)

    def encode_batch(self, texts):
        return [self._backend.encode(text) for text in texts]

    def decode(self, ids):
        return self._backend.decode([int(i) for i in ids])


def _find_end(folder, backend):
    """Returns the end-of-document token: the config's eos_token, else the first known one in the vocabulary."""
    path = folder / "tokenizer_config.json"
    if path.exists():
        try:
            named = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
        except (OSError, ValueError, AttributeError) as error:
            raise BorealError(
                f"{path}: cannot be read: {error}. Expected: a JSON object. Copy the file again."
            ) from None
        if isinstance(named, dict):  # older files write the token with its flags
            named = named.get("content")
        if named is not None:
            if not isinstance(named, str) or backend.token_to_id(named) is None:
                raise BorealError(
                    f"{path}: eos_token is {named!r}, which the vocabulary does not hold. "
                    "Expected: a token of tokenizer.json. Correct the one or the other."
                )
            return named
    for token in KNOWN_ENDS:
        if backend.token_to_id(token) is not None:
            return token
    raise BorealError(
        f"{folder}: no end-of-document token. Expected: eos_token in tokenizer_config.json, or one of "
        f"{', '.join(KNOWN_ENDS)} in the vocabulary. Name the token in tokenizer_config.json."
    )
