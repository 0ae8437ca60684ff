"""Tables that ship with kdagen: a file a device, an entry a line, as `kdagen tune publish --into autotune/tables` writes.

kdagen.autotune.select reads them; tests/compile/test_shipped_tables.py compiles every schedule in them.
"""
