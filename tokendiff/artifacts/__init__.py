"""What stages hand to each other: files, and nothing that opens a model. Read `manifest` first.

For other rooms:
    locations         folders and files, here or behind URIs
    manifest          a folder counts once its MANIFEST.json stands in it; identities of content
    checkpoint        the folders of a training run: named, saved, found again, removed
    noise_process     scheduler_config.json: the noise that a model was trained under
"""
