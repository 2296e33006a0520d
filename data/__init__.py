"""Names as a training set: read a list, split it by word, turn it into contexts and targets.

    names = read_names(None)                    # the shipped list; or "makemore", or a path
    vocabulary = Vocabulary.from_names(names)   # 27 characters, index 0 ends a name
    parts = split(names)                        # 80 / 10 / 10 by word, as the lecture splits
    x, y = contexts(parts.train, vocabulary)    # (n, 3) and (n,), int64

The package needs NumPy alone; `python -m data` (a table, a download) also needs rich. Tokens longer than one
character, lists that do not fit in memory, and sampling are not covered.
"""

from data.contexts import MOST_CONTEXTS, Split, all_contexts, contexts, split
from data.names import FEWEST_NAMES, LONGEST_NAME, read_names
from data.reference import conditional_entropy, count_distinct, uniform_loss, unigram_loss
from data.vocabulary import Vocabulary

__all__ = [
    "FEWEST_NAMES",
    "LONGEST_NAME",
    "MOST_CONTEXTS",
    "Split",
    "Vocabulary",
    "all_contexts",
    "conditional_entropy",
    "contexts",
    "count_distinct",
    "read_names",
    "split",
    "uniform_loss",
    "unigram_loss",
]
