"""What makes parts of these pages: the reference, the JSON Schema, the picture of a sample.

reference         pages written from the code each time the site is built
schema            JSON Schema of a pipeline file; `python -m docs.tools.schema` writes it
hooks             what mkdocs calls
denoising         docs/images/denoising.svg, from a checkpoint
"""
