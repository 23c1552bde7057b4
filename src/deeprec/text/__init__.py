"""Sentence encoders."""

from deeprec.text.encoder import EncoderConfig, SentenceEncoder, load_encoder

__all__ = ["EncoderConfig", "SentenceEncoder", "load_encoder"]
