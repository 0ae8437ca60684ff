"""Tables that ship with kdagen: a file a device, an entry a line, as kdagen.autotune.publish writes them.

kdagen.autotune.select reads them; tests/compile/test_shipped_tables.py compiles every schedule in them.
"""
