"""Where the numbers of a record lie in a table of int64 words: csrc/table.h's Record as the extension tells of it."""

import triton.language as tl

from ..record import memory_layout


def word(name: str) -> tl.constexpr:
    """Which word of a record a field is, or begins with."""
    offset = memory_layout().fields[name][1]
    if offset % 8:
        raise ValueError(f"the field {name} of a record does not begin with a word")
    return tl.constexpr(offset // 8)


RECORD = tl.constexpr(memory_layout().itemsize // 8)  # words of a record
PARAM, STATES, STEP, AVERAGE, COPY = map(word, ("param", "states", "step", "average", "copy"))
ELEMENT_MAP = word("first_element")  # and four more: run, runs, run_stride, outer_stride
AUX, SCALES, SEED, INDEX = map(word, ("aux", "scales", "seed", "index"))  # an index is half a word
NUMEL, BATCH, ROWS, N_COLUMNS = map(word, ("numel", "batch", "rows", "columns"))
