"""KLD of any weights to the checkpoint's, for tests that compare runs."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F  # noqa: N812

from phi4edge.calibration.corpus import load_corpus
from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.model.forward import stream_logits
from phi4edge.model.source import WeightSource
from phi4edge.stages.inputs import check_tokenizer


def mean_kld(folder: Path, source: WeightSource, text: str, *, samples: int, length: int) -> float:
    """Mean over all positions of ``samples`` chunks of the file ``text``, which no run may have seen."""
    checkpoint = open_checkpoint(folder)
    corpus = load_corpus(text, check_tokenizer(checkpoint.index), samples=samples, sequence_length=length)
    both = zip(stream_logits(source, corpus.tokens), stream_logits(checkpoint, corpus.tokens), strict=True)
    values = [
        F.kl_div(F.log_softmax(ours, 1), F.log_softmax(theirs, 1), reduction="none", log_target=True).sum(1).mean()
        for ours, theirs in both
    ]
    return float(sum(values)) / samples
