"""What stages hand to each other: files, and nothing that opens a model. Read `manifest` first.

For other rooms:
    locations         folders and files, here or behind URIs
    store_errors      what the errors of stores mean: which may pass
    manifest          a folder counts once its MANIFEST.json stands in it
    identity          what changes when the content of a file, a folder or a model does
    model_folders     which folder a model's name stands for, and what its config says
    checkpoint        the folders of a training run: named, found again, removed
    last_notes        what a process was at when it was killed
    tensor_files      tensors in safetensors files, of one process or of several
    noise_process     scheduler_config.json: the noise that a model was trained under
"""
