"""The mathematics, with torch alone. Read `kernels` first: the rest serves it.

For other rooms:
    schedules         alpha(t) and its derivative
    kernels           forward processes: corruption, reverse step, bound
    attention_masks   which position sees which
    devices           tensors of the CPU, sent to where the model is
    key_runs          the same by what each query sees: runs of keys
    random            noise that belongs to a row, whatever batch or worker it is in
    splitmix          the generator behind it, and its keys; without torch
    candidates        which drafted tokens follow each other
    interfaces        the protocols by which objectives and samplers call models
"""
