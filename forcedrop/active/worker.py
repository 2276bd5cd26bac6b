"""The process that labels: reads tasks from its standard input, one after another, and answers on its standard output.

Started by ``labelling.Worker``. It ends when its input does, and also, in the middle of a label, when the process that started
it is gone: nobody would read the answer.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from typing import Any, BinaryIO

from forcedrop.active.oracles import compute
from forcedrop.active.processes import leave_with

READY = "ready"


def main() -> None:
    """Answer until there is nobody to answer to."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a calculator prints must not mix with the answers
    leave_with(os.getppid())
    _answer(answers, READY)
    while True:
        try:
            task = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        start = time.monotonic()
        try:
            answer: dict[str, Any] = {"found": compute(task), "reason": None}
        except Exception as error:  # whatever a calculator raises is the label's failure, not the loop's
            reason = f"{type(error).__name__}: {str(error).strip()[:400]}"
            answer = {"found": None, "reason": reason, "errno": getattr(error, "errno", None)}
        _answer(answers, answer | {"seconds": time.monotonic() - start})


def _answer(stream: BinaryIO, answer: Any) -> None:
    pickle.dump(answer, stream)
    stream.flush()


if __name__ == "__main__":
    main()
