"""The run's tokenizer as evaluation asks it: text to ids and back, without added special tokens."""

from argparse import Namespace
from collections.abc import Sequence


class Tokenizer:
    """Megatron's tokenizer of some arguments.

    Attributes:
        eod: id of the end of a document; it stands before the first token of a text.
        size: ids there are; rows of the embedding after them are padding.
    """

    def __init__(self, args: Namespace) -> None:
        """Build it.

        Raises:
            ValueError: it has no text, or no end of a document.
        """
        from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

        if args.tokenizer_type == "NullTokenizer":
            raise ValueError(
                "tokenizer_type = 'NullTokenizer' reads no text: give the --tokenizer-type and "
                "--tokenizer-model that the model was trained with"
            )
        self._tokenizer = build_tokenizer(args)
        library = getattr(self._tokenizer, "_tokenizer", None)
        self._plain = getattr(library, "tokenizer", None)
        self._is_hf = getattr(self._tokenizer, "library", "") == "huggingface"
        self.size = int(self._tokenizer.vocab_size)
        eod = self._tokenizer.eod
        if eod is None:
            raise ValueError(
                f"tokenizer_model = {args.tokenizer_model!r} has no end-of-document token: name it "
                "as eos_token in its tokenizer_config.json"
            )
        self.eod = int(eod)

    def encode(self, text: str) -> list[int]:
        """The ids of a text alone."""
        if self._is_hf and self._plain is not None:  # Megatron's would add what a model expects
            return list(self._plain(text, add_special_tokens=False).input_ids)
        return list(self._tokenizer.tokenize(text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        if self._is_hf and self._plain is not None:
            return str(self._plain.decode(list(ids), skip_special_tokens=False))
        return str(self._tokenizer.detokenize(list(ids)))
