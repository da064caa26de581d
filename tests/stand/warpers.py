"""transformers' own processors of logits for the options of a request: what ours are held to."""

from __future__ import annotations

from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from server.messages import SamplingOptions


def penalties(options: SamplingOptions) -> LogitsProcessorList:
    """What is done whether or not a token is drawn."""
    made = LogitsProcessorList()
    if options.repetition_penalty != 1.0:
        made.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    return made


def warpers(options: SamplingOptions) -> LogitsProcessorList:
    """What is done before a token is drawn, in the order of ``generate``."""
    made = LogitsProcessorList([TemperatureLogitsWarper(options.temperature)])
    if options.top_k:
        made.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1.0:
        made.append(TopPLogitsWarper(options.top_p))
    if options.min_p > 0.0:
        made.append(MinPLogitsWarper(options.min_p))
    if options.typical_p < 1.0:
        made.append(TypicalLogitsWarper(options.typical_p))
    return made
