"""Lends the functions of one module beside this file to the benchmarks.

    python3 serve.py MODULE THREADS DEVICE

One JSON object a line on stdin, one answer a line on stdout; arrays are raw bytes in files.

    {"open": id, "call": name, "arrays": {name: {file, dtype, shape}}, "options": {}} -> {}
    {"time": id, "runs": n} -> {"ms": of one of n runs, back to back}
    {"answer": id, "file": path} -> {}, and the result as f32 in the file
    {"close": id} -> {}

A module has `versions`; `begin(threads, device)`; `array(bytes, dtype, shape)`, whose bytes may be the
first rows alone, to be repeated; `timed(run, runs)` in milliseconds; `numbers(result)` as f32 bytes;
`closed()`; and the functions themselves. They take the arrays and the options and return two functions:
what is timed, and what gives the result to compare. The first line answered is {"versions"}, or
{"absent": why} where a package is not here. What cannot run here raises Absent.
"""

import importlib
import json
import os
import sys


class Absent(Exception):
    """A peer that is missing, with the reason."""


def main():
    # Standard output is reserved for the protocol; prints of libraries go to standard error.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.modules["serve"] = sys.modules["__main__"]

    def reply(message):
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    name, threads, device = sys.argv[1:]
    try:
        module = importlib.import_module(name)
        module.begin(int(threads), device)
    except (ImportError, Absent) as error:
        reply({"absent": str(error)})
        return
    reply({"versions": module.versions})

    def load(array):
        with open(array["file"], "rb") as file:
            data = bytearray(file.read())
        return module.array(data, array["dtype"], array["shape"])

    runs = {}
    for line in sys.stdin:
        ask = json.loads(line)
        try:
            if "open" in ask:
                arrays = {key: load(array) for key, array in ask["arrays"].items()}
                runs[ask["open"]] = getattr(module, ask["call"])(arrays, ask["options"])
                reply({})
            elif "time" in ask:
                reply({"ms": module.timed(runs[ask["time"]][0], ask["runs"])})
            elif "answer" in ask:
                with open(ask["file"], "wb") as file:
                    file.write(module.numbers(runs[ask["answer"]][1]()))
                reply({})
            else:
                runs.pop(ask["close"], None)
                module.closed()
                reply({})
        except Absent as error:
            reply({"absent": str(error)})
        except Exception as error:  # reported by the benchmark, which continues
            reply({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
