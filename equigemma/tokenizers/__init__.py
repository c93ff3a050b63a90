"""One protocol for tokenizers, and SentencePiece's and Hugging Face's behind it."""

from equigemma.tokenizers._tokenizer import SentencePieceTokenizer as SentencePieceTokenizer
from equigemma.tokenizers._tokenizer import SpecialTokens as SpecialTokens
from equigemma.tokenizers._tokenizer import StreamingDecoder as StreamingDecoder
from equigemma.tokenizers._tokenizer import Tokenizer as Tokenizer
from equigemma.tokenizers._tokenizer import check_tokenizer as check_tokenizer
from equigemma.tokenizers._tokenizer import special_tokens as special_tokens
