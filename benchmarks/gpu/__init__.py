"""The package proven and measured on one machine: `python -m benchmarks.gpu --minutes 8 --out OUT`.
Needs torch and transformers alone. Read `command` first: it holds the table of parts.

    command           the options, the parts and their shares of the time
    report            a row of the table; the table, and the JSON file that grows with it
    machine           the device, what it can do at most, and its clock
    models            models, rows and requests of the sizes that a device can bear
    mathematics       schedules, kernels, random numbers, losses and gradients
    attention         flex, tiles and dense; decoding with a cache; compiled and eager
    samplers          the tokens of each sampler
    trainer           averaged weights, resuming, accumulation
    training          tokens per second of training
    decoding          tokens per second of decoding
    profile           how often the CPU waits, and what costs most
    roofline          operations and bytes, counted from shapes
"""
