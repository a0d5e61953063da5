"""What a person submits, one file per command: parse, validate, call, report. Read `train` first.

For other rooms:
    preprocess train generate evaluate pipeline
                      python -m jobs.NAME, or tokendiff NAME

Of this room alone:
    console completion
                      the command tokendiff; what a shell completes of it
    cli               a config, overrides, a flag for every field, exit codes
"""
