"""A month of nights in half an hour: `make soak`. Read `month` first.

corpus      the text of each night: a language that drifts, and once poison
month       the nights: new text, a fault, the pipeline until it is done, what must be true then
checks      champion, disk, and what is left over, each found without the code that decided it
page        nights as a table, and the verdict
"""
