"""Files that were damaged, of every format that the program reads: ``make fuzz``.

    python -m tests.fuzz [FORMAT ...] --count N --seed S
    python -m tests.fuzz onnx --seed S --number 4711   # one file again, with its traceback

A file may be refused in one line, or be valid still; whatever else happens to it is a failure: a
traceback, a warning, a payload that is executed, a file that takes too long or too much memory.
"""
