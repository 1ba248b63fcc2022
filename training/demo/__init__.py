"""The embedded family: a little world, its text, and the models made from it.

`words` (the vocabulary of the world), `world` (people and their facts), `sums`, `chat` (everything that is neither),
`text` (pretraining documents), `dialogues` (what the experts are tuned on), `tokenizer`, `presets`, `stages`,
`evaluate`, `manifest`.
"""
