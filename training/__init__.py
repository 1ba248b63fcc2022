"""Training: the models that steer, and the embedded family. Run `python -m training --help`.

`data` (documents to rows), `losses` (pure functions), `loop` (the one training loop); one small file a command.
"""
