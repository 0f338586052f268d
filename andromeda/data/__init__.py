"""From files to what a model is trained on: text.py makes documents into token ids, windows.py ids into sequences."""
