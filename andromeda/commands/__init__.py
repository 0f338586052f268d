"""The verbs of the command line, one a file. They join what the layers below do not know of each other."""
