"""What a user may set, and how it is read. Read `base` first, then any section.

For other rooms:
    preprocess objectives train samplers generate evaluate frontier promote cluster
                      a section of the file each, or a field with a class per name
    pipeline          the whole file, `Config`, which holds the sections
    loader            YAML, overrides and flags to a `Config`; every error with its place
    strict_yaml       YAML without its surprises
    stage_graph       which stages a file has, and what goes into what

Of this room alone:
    base              what every section is
"""
